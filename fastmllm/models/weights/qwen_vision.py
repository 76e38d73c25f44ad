"""Checkpoint layouts of the native-resolution towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: configurations and names.

Names have no prefix; in a checkpoint it is "visual." (Qwen2-VL, Qwen2.5-VL) or "model.visual." (Qwen3-VL).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmllm.models.qwen_vision import QwenVisionConfig
from fastmllm.models.weights.mapping import Conv, Join, Rule
from fastmllm.models.weights.tower_layouts import ACTIVATIONS, HALF_PIXELS


# configurations -------------------------------------------------------------------------------------------------------
def qwen2_vision_config(raw: Mapping[str, Any]) -> QwenVisionConfig:
    """Read `vision_config` of a Qwen2-VL; what it leaves out has transformers' defaults, as in the next two.

    Raises:
        ValueError: an activation or a kind of rotary positions that is not computed here, or sizes that do not fit.
    """
    width = raw.get("embed_dim", 1280)
    return QwenVisionConfig(
        width=width,
        mlp_width=int(width * raw.get("mlp_ratio", 4)),
        out_width=raw.get("hidden_size", 3584),
        norm="layer",
        activation=_activation(raw, ACTIVATIONS, "quick_gelu"),
        **_shared(raw, depth=32, patch_size=14),
    )


def qwen2_5_vision_config(raw: Mapping[str, Any]) -> QwenVisionConfig:
    """Read `vision_config` of a Qwen2.5-VL.

    transformers' default width is 3584, that of the language model; published towers say 1280.
    """
    shared = _shared(raw, depth=32, patch_size=14)
    full = raw.get("fullatt_block_indexes", (7, 15, 23, 31))
    return QwenVisionConfig(
        width=raw.get("hidden_size", 3584),
        mlp_width=raw.get("intermediate_size", 3420),
        out_width=raw.get("out_hidden_size", 3584),
        activation=_activation(raw, {"silu": "silu"}, "silu"),
        window=raw.get("window_size", 112) // shared["merge_size"] // shared["patch_size"],
        full_layers=tuple(k for k in range(shared["depth"]) if k in full),
        **shared,
    )


def qwen3_vision_config(raw: Mapping[str, Any]) -> QwenVisionConfig:
    """Read `vision_config` of a Qwen3-VL."""
    places = raw.get("num_position_embeddings", 2304)
    side = round(places**0.5)
    if side**2 != places:
        raise ValueError(f"fastmllm::weights: qwen3_vl: num_position_embeddings {places} is not a square")
    return QwenVisionConfig(
        width=raw.get("hidden_size", 1152),
        mlp_width=raw.get("intermediate_size", 4304),
        out_width=raw.get("out_hidden_size", 3584),
        norm="layer",
        activation=_activation(raw, ACTIVATIONS, "gelu_pytorch_tanh"),
        patch_bias=True,
        position_grid=side,
        deepstack_layers=tuple(raw.get("deepstack_visual_indexes", (8, 16, 24))),
        **HALF_PIXELS,
        **_shared(raw, depth=27, patch_size=16),
    )


def _shared(raw: Mapping[str, Any], depth: int, patch_size: int) -> dict[str, Any]:
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "axial"))
    if kind not in ("axial", "default"):  # transformers reads the second as the first
        raise ValueError(f"fastmllm::weights: Qwen-VL's tower: rope_type {kind!r} is not computed here (axial)")
    found = {
        "depth": raw.get("depth", raw.get("num_hidden_layers", depth)),
        "num_heads": raw.get("num_heads", raw.get("num_attention_heads", 16)),
        "patch_size": raw.get("patch_size", patch_size),
        "temporal_patch_size": raw.get("temporal_patch_size", 2),
        "merge_size": raw.get("spatial_merge_size", 2),
        "channels": raw.get("in_channels", 3),
    }
    for name, value in found.items():
        if not isinstance(value, int):
            raise ValueError(f"fastmllm::weights: Qwen-VL's tower: {name} {value!r} is not one whole number")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    return {**found, "rope_theta": float(theta)}


def _activation(raw: Mapping[str, Any], known: Mapping[str, str], default: str) -> str:
    name = raw.get("hidden_act", default)
    if name not in known:
        raise ValueError(
            f"fastmllm::weights: Qwen-VL's tower: hidden_act {name!r} is not computed here ({', '.join(known)})"
        )
    return known[name]


# names ----------------------------------------------------------------------------------------------------------------
def qwen_vision_rules(config: QwenVisionConfig) -> list[Rule]:
    """Return a tower's table of names; the config tells the family."""
    patches = Conv(config.patch_size, config.temporal_patch_size, config.channels)
    rules = [
        Rule("patch_embed.weight", "patch_embed.proj.weight", patches),
        Rule("blocks.{i}.norm{j}.{p}", "blocks.{i}.norm{j}.{p}"),
        Rule("blocks.{i}.attn.{n}.{p}", "blocks.{i}.attn.{n}.{p}"),
    ]
    if config.position_grid is not None:  # Qwen3-VL
        return [
            *rules,
            Rule("patch_embed.bias", "patch_embed.proj.bias"),
            Rule("patch_embed.position", "pos_embed.weight"),
            *_mlp("blocks.{i}.mlp.", "blocks.{i}.mlp.linear_fc1", "blocks.{i}.mlp.linear_fc2"),
            Rule("merger.norm.{p}", "merger.norm.{p}"),
            *_mlp("merger.", "merger.linear_fc1", "merger.linear_fc2"),
            Rule("deepstack.{i}.norm.{p}", "deepstack_merger_list.{i}.norm.{p}"),
            *_mlp("deepstack.{i}.", "deepstack_merger_list.{i}.linear_fc1", "deepstack_merger_list.{i}.linear_fc2"),
        ]
    rules += [Rule("merger.norm.{p}", "merger.ln_q.{p}"), *_mlp("merger.", "merger.mlp.0", "merger.mlp.2")]
    if config.activation != "silu":  # Qwen2-VL
        return [*rules, *_mlp("blocks.{i}.mlp.", "blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc2")]
    gate_up = ("blocks.{i}.mlp.gate_proj.{p}", "blocks.{i}.mlp.up_proj.{p}")
    return [
        *rules,
        Rule("blocks.{i}.mlp.gate_up.{p}", gate_up, Join(2)),
        Rule("blocks.{i}.mlp.down.{p}", "blocks.{i}.mlp.down_proj.{p}"),
    ]


def _mlp(ours: str, first: str, second: str) -> list[Rule]:
    return [Rule(f"{ours}{{p}}1", f"{first}.{{p}}"), Rule(f"{ours}{{p}}2", f"{second}.{{p}}")]
