"""Token-level connectors of published checkpoints: their configurations and their tables of names.

Names are those inside of a model; `prefixed` puts "model." and the like in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmllm.models.weights.mapping import Form, Join, Rule, View, expect
from fastmllm.models.weights.values import (
    MOST_LAYERS,
    named,
    read_choice,
    read_flag,
    read_list,
    read_number,
    read_size,
    wrong,
)
from fastmllm.modules.projector import Projector, ShuffleProjector
from fastmllm.modules.qformer import QFormerConfig


@dataclass(frozen=True, slots=True)
class Cut(Form):
    """One tensor of a checkpoint, several of ours: cut along the first axis."""

    parts: int = 3

    def pack(self, theirs: list[Tensor]) -> list[Tensor]:
        expect(theirs, *(theirs[0].shape or (-1,)))
        return [part.clone() for part in theirs[0].tensor_split(self.parts)]

    def unpack(self, ours: list[Tensor]) -> list[Tensor]:
        return [torch.cat(ours)]


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
    raw: Mapping[str, Any], width_in: int, width_out: int, origin: str = "config.json"
) -> tuple[Projector | ShuffleProjector, list[Rule]]:
    """Build the connector of a checkpoint, not yet filled, and its table.

    Args:
        raw: config.json.
        width_in: of the image encoder.
        width_out: of the language model.
        origin: what the messages call the file.

    Returns:
        The connector; where `vision_feature_layer` names several layers it takes them side by side.

    Raises:
        ValueError: an unknown family, or something that is not computed here.
    """
    kind = raw.get("model_type")
    if kind in ("idefics3", "smolvlm"):
        return ShuffleProjector(width_in, width_out, shuffle=read_size(raw, "scale_factor", 2, origin)), SHUFFLE_RULES
    if kind == "nanovlm":
        factor = read_size(raw, "mp_pixel_shuffle_factor", 4, origin)
        return ShuffleProjector(width_in, width_out, shuffle=factor), NANOVLM_RULES
    activation = _activation(raw, "projector_hidden_act", origin)
    if kind == "internvl":
        ratio = read_number(raw, "downsample_ratio", 0.5, origin)
        factor = round(1 / ratio)
        if ratio * factor != 1:
            raise wrong(origin, "downsample_ratio", ratio, "not 1 over a whole number of patches")
        return Projector(width_in, width_out, shuffle=factor, norm=True, activation=activation), PROJECTOR_RULES
    if kind == "vipllava":
        name = "vision_feature_layer" if "vision_feature_layer" in raw else "vision_feature_layers"
        width_in *= _count(feature_layers(raw, (-2, -5, -8, -11, 6), origin, name))
        eps = read_number(raw, "projector_layernorm_eps", 1e-5, origin)
        return Projector(width_in, width_out, norm=True, activation=activation, norm_eps=eps), VIPLLAVA_RULES
    if kind in _LLAVA:
        width_in *= _count(feature_layers(raw, -2, origin))
        bias = read_flag(raw, "multimodal_projector_bias", True, origin)
        return Projector(width_in, width_out, activation=activation, bias=bias), PROJECTOR_RULES
    raise ValueError(
        f"fastmllm::weights: {origin}: no projector of model_type {kind!r} is known (idefics3, internvl, nanovlm, "
        f"smolvlm, vipllava, {', '.join(_LLAVA)})"
    )


# MobileVLM V2 (mm_projector_type ldpnetv2)
LDPV2_RULES = [
    *mlp_rules("mlp", "mm_projector.mlp.mlp.0", "mm_projector.mlp.mlp.2"),
    Rule("conv.{p}", "mm_projector.peg.peg.0.{p}"),
]
# TokenPacker; query, key and value share a tensor in torch's MultiheadAttention
TOKEN_PACKER_RULES = [
    Rule("to_query.weight", "mm_projector.q_proj_1.weight"),
    *mlp_rules("to_key", "mm_projector.k_proj_1.0", "mm_projector.k_proj_1.2"),
    *mlp_rules("to_value", "mm_projector.v_proj_1.0", "mm_projector.v_proj_1.2"),
    *(Rule(f"norm_{n}.{{p}}", f"mm_projector.ln_{n[0]}_1.{{p}}") for n in ("query", "key", "value")),
    Rule(("q.weight", "k.weight", "v.weight"), "mm_projector.clip_attn.in_proj_weight", Cut()),
    Rule(("q.bias", "k.bias", "v.bias"), "mm_projector.clip_attn.in_proj_bias", Cut()),
    Rule("proj.{p}", "mm_projector.clip_attn.out_proj.{p}"),
    *mlp_rules("mlp", "mm_projector.mlp.0", "mm_projector.mlp.2"),
]


def abstractor_rules(width_in: int, width: int, grid: int, depth: int = 3) -> list[Rule]:
    """Name a C-Abstractor's tensors as Honeybee's checkpoints do; 1 x 1 convolutions are matrices here."""
    rules = [Rule("position", "abstractor.pos_emb", View(ours=(grid**2, width_in), theirs=(1, grid**2, width_in)))]
    for ours, theirs in (("before", "abstractor.net.0"), ("behind", "abstractor.net.2")):
        for k in range(depth):
            rules += _block_rules(
                f"{ours}.{k}", f"{theirs}.b{k + 1}", width if k or ours == "behind" else width_in, width
            )
    return [*rules, *(Rule(f"fc{k + 1}.{{p}}", f"abstractor.readout.{2 * k}.{{p}}") for k in range(2))]


def _block_rules(ours: str, theirs: str, width_in: int, width: int) -> list[Rule]:
    squeezed = round(width_in * 0.25)
    matrices = {
        "conv1": ("conv1.conv", width_in), "conv3": ("conv3.conv", width), "shortcut": ("downsample.conv", width_in),
        "squeeze": ("se.fc1", width), "excite": ("se.fc2", squeezed),
    }  # fmt: skip
    norms = {"norm1": "conv1.bn", "norm2": "conv2.bn", "norm3": "conv3.bn", "shortcut_norm": "downsample.bn"}
    return [
        *(
            Rule(f"{ours}.{name}.weight", f"{theirs}.{t}.weight", View(ours=(-1, n), theirs=(-1, n, 1, 1)))
            for name, (t, n) in matrices.items()
        ),
        *(Rule(f"{ours}.{name}.bias", f"{theirs}.{matrices[name][0]}.bias") for name in ("squeeze", "excite")),
        *(Rule(f"{ours}.{name}.{{p}}", f"{theirs}.{t}.{{p}}") for name, t in norms.items()),
        Rule(f"{ours}.conv2.weight", f"{theirs}.conv2.conv.weight"),
    ]


def feature_layers(
    raw: Mapping[str, Any], default: int | tuple[int, ...], origin: str, name: str = "vision_feature_layer"
) -> int | tuple[int, ...]:
    """Read which hidden states of the encoder are features: one, or several side by side.

    Args:
        raw: config.json.
        default: where it says none.
        origin: what the messages call the file.
        name: its key.
    """
    value = raw.get(name, default)
    if isinstance(value, list | tuple) and value:
        return tuple(read_list({name: value}, name, (), int, origin))
    return read_size({name: value}, name, None, origin, least=-(2**31))


def _count(layers: int | tuple[int, ...]) -> int:
    return 1 if isinstance(layers, int) else len(layers)


def _activation(raw: Mapping[str, Any], key: str, origin: str) -> str:
    return ACTIVATIONS[read_choice(raw, key, "gelu", ACTIVATIONS, origin)]


def read_qformer(
    raw: Mapping[str, Any], num_queries: int = 32, text: bool | None = None, origin: str = "qformer_config"
) -> QFormerConfig:
    """Read the `qformer_config` of a BLIP-2 or InstructBLIP checkpoint.

    Args:
        raw: that part of config.json.
        num_queries: `num_query_tokens` of the whole.
        text: whether it reads text; None follows the family: InstructBLIP does, BLIP-2 where `use_qformer_text_input`.
        origin: what the messages call it.

    Raises:
        ValueError: something that is not computed here, or a value of another kind.
    """
    read_choice(raw, "position_embedding_type", "absolute", ("absolute",), origin)
    reads = read_flag(raw, "use_qformer_text_input", False, origin)
    if text is None:
        text = raw.get("model_type") == "instructblip_qformer" or reads
    with named(origin):
        return QFormerConfig(
            width=read_size(raw, "hidden_size", 768, origin),
            depth=read_size(raw, "num_hidden_layers", 12, origin, most=MOST_LAYERS),
            num_heads=read_size(raw, "num_attention_heads", 12, origin),
            mlp_width=read_size(raw, "intermediate_size", 3072, origin),
            media_width=read_size(raw, "encoder_hidden_size", 1408, origin),
            num_queries=num_queries,
            cross_every=read_size(raw, "cross_attention_frequency", 2, origin),
            norm_eps=read_number(raw, "layer_norm_eps", 1e-12, origin),
            activation=_activation(raw, "hidden_act", origin),
            vocab_size=read_size(raw, "vocab_size", 30522, origin) if text else 0,
            max_positions=read_size(raw, "max_position_embeddings", 512, origin),
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
