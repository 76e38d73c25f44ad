"""Token-level connectors of published checkpoints: their configurations and their tables of names.

Names are those inside of a model; `prefixed` puts "model." and the like in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmllm.models.weights.mapping import Join, Rule, View
from fastmllm.modules.projector import Projector, ShuffleProjector
from fastmllm.modules.qformer import QFormerConfig

# transformers' names of the activations that are computed here
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def mlp_rules(ours: str, first: str, second: str) -> list[Rule]:
    """Name the two layers of a `GeluMLP`."""
    return [
        Rule(f"{ours}.{kind}{k}", f"{name}.{kind}")
        for k, name in ((1, first), (2, second))
        for kind in ("weight", "bias")
    ]


# Llava, LlavaNext, LlavaOnevision, VipLlava, InternVL in transformers
PROJECTOR_RULES = [
    *mlp_rules("mlp", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    Rule("norm.{p}", "multi_modal_projector.layer_norm.{p}"),
]
VIPLLAVA_RULES = [*PROJECTOR_RULES[:-1], Rule("norm.{p}", "multi_modal_projector.projector_layernorm.{p}")]
# Idefics3 and SmolVLM
SHUFFLE_RULES = [Rule("proj.weight", "connector.modality_projection.proj.weight")]
NANOVLM_RULES = [Rule("proj.weight", "MP.proj.weight")]

_LLAVA = ("llava", "llava_next", "llava_onevision")


def read_projector(
    raw: Mapping[str, Any], width_in: int, width_out: int
) -> tuple[Projector | ShuffleProjector, list[Rule]]:
    """Build the connector of a checkpoint, not yet filled, and its table.

    Args:
        raw: config.json.
        width_in: of the image encoder.
        width_out: of the language model.

    Returns:
        The connector; where `vision_feature_layer` names several layers it takes them side by side.

    Raises:
        ValueError: an unknown family, or something that is not computed here.
    """
    kind = raw.get("model_type")
    if kind in ("idefics3", "smolvlm"):
        return ShuffleProjector(width_in, width_out, shuffle=raw.get("scale_factor", 2)), SHUFFLE_RULES
    if kind == "nanovlm":
        return ShuffleProjector(width_in, width_out, shuffle=raw.get("mp_pixel_shuffle_factor", 4)), NANOVLM_RULES
    activation = _activation(raw, "projector_hidden_act")
    if kind == "internvl":
        factor = int(1 / raw.get("downsample_ratio", 0.5))
        return Projector(width_in, width_out, shuffle=factor, norm=True, activation=activation), PROJECTOR_RULES
    if kind == "vipllava":
        width_in *= _layers(raw.get("vision_feature_layer", raw.get("vision_feature_layers", (-2, -5, -8, -11, 6))))
        eps = raw.get("projector_layernorm_eps", 1e-5)
        return Projector(width_in, width_out, norm=True, activation=activation, norm_eps=eps), VIPLLAVA_RULES
    if kind in _LLAVA:
        width_in *= _layers(raw.get("vision_feature_layer", -2))
        bias = raw.get("multimodal_projector_bias", True)
        return Projector(width_in, width_out, activation=activation, bias=bias), PROJECTOR_RULES
    raise ValueError(
        f"fastmllm::weights: no projector of model_type {kind!r} is known (idefics3, internvl, nanovlm, smolvlm, "
        f"vipllava, {', '.join(_LLAVA)})"
    )


def _layers(value: int | list[int] | tuple[int, ...]) -> int:
    return 1 if isinstance(value, int) else len(value)


def _activation(raw: Mapping[str, Any], key: str) -> str:
    name = raw.get(key, "gelu")
    if name not in ACTIVATIONS:
        raise ValueError(f"fastmllm::weights: {key} {name!r} is not computed here (only {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


def read_qformer(raw: Mapping[str, Any], num_queries: int = 32, text: bool | None = None) -> QFormerConfig:
    """Read the `qformer_config` of a BLIP-2 or InstructBLIP checkpoint.

    Args:
        raw: that part of config.json.
        num_queries: `num_query_tokens` of the whole.
        text: whether it reads text; None follows the family: InstructBLIP does, BLIP-2 where `use_qformer_text_input`.

    Raises:
        ValueError: something that is not computed here.
    """
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"fastmllm::weights: position_embedding_type {raw['position_embedding_type']!r} is not computed here"
        )
    if text is None:
        text = raw.get("model_type") == "instructblip_qformer" or raw.get("use_qformer_text_input", False)
    return QFormerConfig(
        width=raw.get("hidden_size", 768),
        depth=raw.get("num_hidden_layers", 12),
        num_heads=raw.get("num_attention_heads", 12),
        mlp_width=raw.get("intermediate_size", 3072),
        media_width=raw.get("encoder_hidden_size", 1408),
        num_queries=num_queries,
        cross_every=raw.get("cross_attention_frequency", 2),
        norm_eps=raw.get("layer_norm_eps", 1e-12),
        activation=_activation(raw, "hidden_act"),
        vocab_size=raw.get("vocab_size", 30522) if text else 0,
        max_positions=raw.get("max_position_embeddings", 512),
    )


def qformer_rules(config: QFormerConfig, instruct: bool) -> list[Rule]:
    """Name a Q-Former's tensors as InstructBLIP does, or else as BLIP-2 does (with text: as for retrieval)."""
    ours, theirs = "layers.{i}", "qformer.encoder.layer.{i}"
    attn, cross = f"{theirs}.attention", f"{theirs}.crossattention"
    rules = [
        Rule(f"{ours}.attn.qkv.{{p}}", tuple(f"{attn}.attention.{n}.{{p}}" for n in ("query", "key", "value")), Join()),
        Rule(f"{ours}.cross.q.{{p}}", f"{cross}.attention.query.{{p}}"),
        Rule(f"{ours}.cross.kv.{{p}}", tuple(f"{cross}.attention.{n}.{{p}}" for n in ("key", "value")), Join(parts=2)),
    ]
    for name, side in (("attn", attn), ("cross", cross)):
        rules.append(Rule(f"{ours}.{name}.proj.{{p}}", f"{side}.output.dense.{{p}}"))
        rules.append(Rule(f"{ours}.{name}.norm.{{p}}", f"{side}.output.LayerNorm.{{p}}"))
    for name, which in (("ffn_query", "_query"), ("ffn_text", "")):
        first, second = f"{theirs}.intermediate{which}.dense", f"{theirs}.output{which}"
        rules += mlp_rules(f"{ours}.{name}.mlp", first, f"{second}.dense")
        rules.append(Rule(f"{ours}.{name}.norm.{{p}}", f"{second}.LayerNorm.{{p}}"))
    shape = (config.num_queries, config.width)
    inside = "qformer." if instruct else ""
    return [
        *rules,
        Rule("queries", "query_tokens", View(ours=shape, theirs=(1, *shape))),
        Rule("norm.{p}", "qformer.embeddings.layernorm.{p}" if instruct else "qformer.layernorm.{p}"),
        Rule("word_embeddings.weight", f"{inside}embeddings.word_embeddings.weight"),
        Rule("position_embeddings.weight", f"{inside}embeddings.position_embeddings.weight"),
    ]
