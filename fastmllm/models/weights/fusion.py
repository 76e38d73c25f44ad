"""Checkpoint layouts of the cross-attention layers and Perceiver resamplers, and what their config.json says of them.

The tables name one module's tensors; put the place of the module in front of them with `prefixed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmllm.models.weights.mapping import Form, Join, Rule, View, prefixed
from fastmllm.models.weights.values import (
    MOST_LAYERS,
    named,
    read_choice,
    read_flag,
    read_number,
    read_part,
    read_size,
)
from fastmllm.modules.cross_attention import CrossAttentionConfig
from fastmllm.modules.high_res import HighResConfig
from fastmllm.modules.resampler import ResamplerConfig

_KV = Join(parts=2)

# OpenFlamingo, at lang_encoder.gated_cross_attn_layers.{i}
FLAMINGO_CROSS = [
    Rule("norm.{p}", "attn.norm.{p}"),
    Rule("q_proj.weight", "attn.to_q.weight"),
    Rule("kv_proj.weight", "attn.to_kv.weight"),
    Rule("o_proj.weight", "attn.to_out.weight"),
    Rule("attn_gate", "attn_gate"),
    Rule("ffn_norm_{p}", "ff.0.{p}"),
    Rule("ffn.weight1", "ff.1.weight"),
    Rule("ffn.weight2", "ff.3.weight"),
    Rule("ffn_gate", "ff_gate"),
]

# CogAgent, at model.layers.{i}
COGAGENT_CROSS = [
    Rule("norm.weight", "post_cross_attention_layernorm.weight"),
    Rule("q_proj.weight", "cross_attn.query.weight"),
    Rule("kv_proj.weight", "cross_attn.key_value.weight"),
    Rule("o_proj.weight", "cross_attn.dense.weight"),
]

_LLAMA_CROSS = [  # what transformers' Idefics and Mllama share
    Rule("norm.weight", "input_layernorm.weight"),
    Rule("q_proj.weight", "cross_attn.q_proj.weight"),
    Rule("kv_proj.weight", ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight"), _KV),
    Rule("o_proj.weight", "cross_attn.o_proj.weight"),
    Rule("ffn_norm_weight", "post_attention_layernorm.weight"),
    Rule("ffn.{layer}_proj.weight", "mlp.{layer}_proj.weight"),
]

# Llama-3.2-Vision, at the language model's layers.{i} for each i of cross_attention_layers
MLLAMA_CROSS = [
    *_LLAMA_CROSS,
    Rule("q_norm.weight", "cross_attn.q_norm.weight"),
    Rule("k_norm.weight", "cross_attn.k_norm.weight"),
    Rule("attn_gate", "cross_attn_attn_gate"),
    Rule("ffn_gate", "cross_attn_mlp_gate"),
]

# Idefics, at model.perceiver_resampler
IDEFICS_RESAMPLER = [
    Rule("latents", "latents"),
    Rule("layers.{i}.media_norm.{p}", "blocks.{i}.0.context_layer_norm.{p}"),
    Rule("layers.{i}.latents_norm.{p}", "blocks.{i}.0.latents_layer_norm.{p}"),
    Rule("layers.{i}.q_norm.{p}", "blocks.{i}.0.q_layer_norm.{p}"),
    Rule("layers.{i}.k_norm.{p}", "blocks.{i}.0.k_layer_norm.{p}"),
    Rule("layers.{i}.q_proj.weight", "blocks.{i}.0.q_proj.weight"),
    Rule("layers.{i}.kv_proj.weight", ("blocks.{i}.0.k_proj.weight", "blocks.{i}.0.v_proj.weight"), _KV),
    Rule("layers.{i}.o_proj.weight", "blocks.{i}.0.output_proj.weight"),
    Rule("layers.{i}.ffn_norm.{p}", "blocks.{i}.1.ln.{p}"),
    Rule("layers.{i}.ffn.fc1.weight", "blocks.{i}.1.fc.weight"),
    Rule("layers.{i}.ffn.fc2.weight", "blocks.{i}.1.c_proj.weight"),
    Rule("norm.{p}", "layer_norm.{p}"),
]

# Idefics2, at model.connector.perceiver_resampler
IDEFICS2_RESAMPLER = [
    Rule("latents", "latents"),
    Rule("layers.{i}.media_norm.weight", "layers.{i}.input_context_norm.weight"),
    Rule("layers.{i}.latents_norm.weight", "layers.{i}.input_latents_norm.weight"),
    Rule("layers.{i}.q_proj.weight", "layers.{i}.self_attn.q_proj.weight"),
    Rule(
        "layers.{i}.kv_proj.weight",
        ("layers.{i}.self_attn.k_proj.weight", "layers.{i}.self_attn.v_proj.weight"),
        _KV,
    ),
    Rule("layers.{i}.o_proj.weight", "layers.{i}.self_attn.o_proj.weight"),
    Rule("layers.{i}.ffn_norm.weight", "layers.{i}.post_attention_layernorm.weight"),
    Rule("layers.{i}.ffn.{layer}_proj.weight", "layers.{i}.mlp.{layer}_proj.weight"),
    Rule("norm.weight", "norm.weight"),
]

# Idefics2, at model.connector
IDEFICS2_CONNECTOR = [
    Rule("projection.{layer}_proj.weight", "modality_projection.{layer}_proj.weight"),
    *prefixed(IDEFICS2_RESAMPLER, theirs="perceiver_resampler."),
]


def idefics_cross_rules(config: CrossAttentionConfig) -> list[Rule]:
    """Return the table of one layer at model.gated_cross_attn_layers.{i} of Idefics.

    Args:
        config: says whether a gate is one number, (1,) on both sides, or a channel's, (1, 1, D) in the checkpoint.

    Returns:
        The table.
    """
    form = View(ours=(-1,), theirs=(1, 1, -1)) if config.channel_gates else Form()
    return [
        *_LLAMA_CROSS,
        Rule("q_norm.weight", "cross_attn.q_layer_norm.weight"),
        Rule("k_norm.weight", "cross_attn.k_layer_norm.weight"),
        Rule("attn_gate", "alpha_cross_attn", form),
        Rule("ffn_gate", "alpha_dense", form),
    ]


def flamingo_resampler_rules(config: ResamplerConfig) -> list[Rule]:
    """Return the table of OpenFlamingo's resampler, at perceiver.

    Args:
        config: says the width D: the embeddings of images are (M, 1, D) in the checkpoint.

    Returns:
        The table.
    """
    return [
        Rule("latents", "latents"),
        Rule("frame_embedding", "frame_embs"),
        Rule("media_embedding", "media_time_embs", View(ours=(-1, config.width), theirs=(-1, 1, config.width))),
        Rule("layers.{i}.media_norm.{p}", "layers.{i}.0.norm_media.{p}"),
        Rule("layers.{i}.latents_norm.{p}", "layers.{i}.0.norm_latents.{p}"),
        Rule("layers.{i}.q_proj.weight", "layers.{i}.0.to_q.weight"),
        Rule("layers.{i}.kv_proj.weight", "layers.{i}.0.to_kv.weight"),
        Rule("layers.{i}.o_proj.weight", "layers.{i}.0.to_out.weight"),
        Rule("layers.{i}.ffn_norm.{p}", "layers.{i}.1.0.{p}"),
        Rule("layers.{i}.ffn.weight1", "layers.{i}.1.1.weight"),
        Rule("layers.{i}.ffn.weight2", "layers.{i}.1.3.weight"),
        Rule("norm.{p}", "norm.{p}"),
    ]


def idefics_cross_config(raw: Mapping[str, Any], origin: str = "Idefics") -> CrossAttentionConfig:
    """Read the gated cross-attention layers of an Idefics config.json.

    Args:
        raw: the file's object.
        origin: what the messages call it, as in all functions here.

    Returns:
        The shape; the media are those of the vision tower or of the resampler, which have one width.

    Raises:
        ValueError: an activation, a dropout or a kind of gate that is not computed here, or a value of another kind.
    """
    read_choice(raw, "hidden_act", "silu", ("silu",), origin)
    _no_dropout(raw, "dropout", origin)
    alpha = read_choice(raw, "alpha_type", "float", ("float", "vector"), origin)
    with named(origin):
        return CrossAttentionConfig.idefics(
            width=read_size(raw, "hidden_size", 4096, origin), media_width=_idefics_vision_width(raw, origin),
            num_heads=read_size(raw, "num_attention_heads", 32, origin),
            ffn_width=read_size(raw, "intermediate_size", 11008, origin),
            norm_eps=read_number(raw, "rms_norm_eps", 1e-6, origin),
            qk_norm=read_flag(raw, "qk_layer_norms", False, origin), channel_gates=alpha == "vector",
        )  # fmt: skip


def idefics_resampler_config(raw: Mapping[str, Any], origin: str = "Idefics") -> ResamplerConfig | None:
    """Read the Perceiver resampler of an Idefics config.json; None where the model has none."""
    if not read_flag(raw, "use_resampler", False, origin):
        return None
    perceiver, inside = read_part(raw, "perceiver_config", origin, {}), f"{origin} (perceiver_config)"
    with named(inside):
        return ResamplerConfig.idefics(
            width=_idefics_vision_width(raw, origin),
            num_latents=read_size(perceiver, "resampler_n_latents", 64, inside),
            depth=read_size(perceiver, "resampler_depth", 6, inside, most=MOST_LAYERS),
            num_heads=read_size(perceiver, "resampler_n_heads", 16, inside),
            head_dim=read_size(perceiver, "resampler_head_dim", 96, inside),
            qk_norm=read_flag(perceiver, "qk_layer_norms_perceiver", False, inside),
        )  # fmt: skip


def mllama_cross_config(raw: Mapping[str, Any], origin: str = "Mllama") -> CrossAttentionConfig:
    """Read the cross-attention layers of Llama-3.2-Vision.

    Args:
        raw: `text_config` of config.json.
        origin: what the messages call it.

    Returns:
        The shape, with Meta's policy for rows without an image.

    Raises:
        ValueError: an activation or a dropout that is not computed here, or a value of another kind.
    """
    read_choice(raw, "hidden_act", "silu", ("silu",), origin)
    _no_dropout(raw, "dropout", origin)
    with named(origin):
        return CrossAttentionConfig.mllama(
            width=read_size(raw, "hidden_size", 4096, origin),
            num_heads=read_size(raw, "num_attention_heads", 32, origin),
            num_kv_heads=read_size(raw, "num_key_value_heads", 8, origin),
            ffn_width=read_size(raw, "intermediate_size", 14336, origin),
            norm_eps=read_number(raw, "rms_norm_eps", 1e-5, origin),
        )


def idefics2_resampler_config(raw: Mapping[str, Any], origin: str = "Idefics2") -> ResamplerConfig:
    """Read the connector of an Idefics2 config.json: modality projection and resampler.

    Args:
        raw: the file's object.
        origin: what the messages call it.

    Returns:
        The shape. As in transformers, a text model of another width than `perceiver_config` gives its width and eps.

    Raises:
        ValueError: an activation or a dropout that is not computed here, or a value of another kind.
    """
    perceiver, text, vision = (read_part(raw, f"{part}_config", origin, {}) for part in ("perceiver", "text", "vision"))
    inside, beside = f"{origin} (perceiver_config)", f"{origin} (text_config)"
    read_choice(perceiver, "hidden_act", "silu", ("silu",), inside)
    _no_dropout(perceiver, "attention_dropout", inside)
    read_choice(text, "hidden_act", "silu", ("silu",), beside)
    width = read_size(perceiver, "hidden_size", 4096, inside)
    eps = read_number(perceiver, "rms_norm_eps", 1e-6, inside)
    if read_size(text, "hidden_size", 4096, beside) != width:
        # transformers' default of eps is 1e-5 where text_config is missing and Mistral's where it is there
        width, eps = text.get("hidden_size", 4096), read_number(text, "rms_norm_eps", 1e-6 if text else 1e-5, beside)
    with named(origin):
        return ResamplerConfig.idefics2(
            width=width, num_latents=read_size(perceiver, "resampler_n_latents", 64, inside),
            depth=read_size(perceiver, "resampler_depth", 3, inside, most=MOST_LAYERS),
            num_heads=read_size(perceiver, "resampler_n_heads", 16, inside),
            num_kv_heads=read_size(perceiver, "num_key_value_heads", 4, inside),
            head_dim=read_size(perceiver, "resampler_head_dim", 96, inside), norm_eps=eps,
            media_width=read_size(vision, "hidden_size", 768, f"{origin} (vision_config)"),
            projection_width=read_size(text, "intermediate_size", 14336, beside),
        )  # fmt: skip


def cogagent_cross_config(raw: Mapping[str, Any], origin: str = "CogAgent") -> HighResConfig:
    """Read the cross modules of a CogAgent config.json.

    Raises:
        ValueError: the cross width is no multiple of the heads, or a value of another kind.
    """
    heads = read_size(raw, "num_attention_heads", 32, origin)
    inner = read_size(raw, "cross_compute_hidden_size", 1024, origin)
    if inner % heads:
        raise ValueError(
            f"fastmllm::weights: {origin}: cross_compute_hidden_size {inner} is no multiple of {heads} heads"
        )
    with named(origin):
        return HighResConfig(
            width=read_size(raw, "hidden_size", 4096, origin),
            media_width=read_size(raw, "cross_hidden_size", 1024, origin), num_heads=heads,
            head_dim=inner // heads, norm_eps=read_number(raw, "rms_norm_eps", 1e-5, origin),
        )  # fmt: skip


def _idefics_vision_width(raw: Mapping[str, Any], origin: str) -> int:
    vision = read_part(raw, "vision_config", origin, {})
    name = "embed_dim" if "embed_dim" in vision else "hidden_size"
    return read_size(vision, name, 768, f"{origin} (vision_config)")


def _no_dropout(raw: Mapping[str, Any], name: str, origin: str) -> None:
    if rate := read_number(raw, name, 0.0, origin, zero=True):
        raise ValueError(f"fastmllm::weights: {origin}: {name} {rate} is not computed here, only 0")
