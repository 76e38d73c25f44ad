"""Checkpoint layouts of the native-resolution towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: configurations and names.

Names have no prefix; in a checkpoint it is "visual." (Qwen2-VL, Qwen2.5-VL) or "model.visual." (Qwen3-VL).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastmllm.models.qwen_vision import QwenVisionConfig
from fastmllm.models.weights.mapping import Conv, Join, Rule
from fastmllm.models.weights.tower_layouts import ACTIVATIONS, HALF_PIXELS
from fastmllm.models.weights.values import (
    MOST_LAYERS,
    named,
    read_choice,
    read_list,
    read_number,
    read_part,
    read_size,
)


# configurations -------------------------------------------------------------------------------------------------------
def qwen2_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> QwenVisionConfig:
    """Read `vision_config` of a Qwen2-VL; what it leaves out has transformers' defaults, as in the next two.

    Raises:
        ValueError: an activation or a kind of rotary positions that is not computed here, values of another kind, or
            sizes that do not fit.
    """
    width = read_size(raw, "embed_dim", 1280, origin)
    with named(origin):
        return QwenVisionConfig(
            width=width,
            mlp_width=int(width * read_number(raw, "mlp_ratio", 4, origin)),
            out_width=read_size(raw, "hidden_size", 3584, origin),
            norm="layer",
            activation=ACTIVATIONS[read_choice(raw, "hidden_act", "quick_gelu", ACTIVATIONS, origin)],
            **_shared(raw, origin, depth=32, patch_size=14),
        )


def qwen2_5_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> QwenVisionConfig:
    """Read `vision_config` of a Qwen2.5-VL.

    transformers' default width is 3584, that of the language model; published towers say 1280.
    """
    shared = _shared(raw, origin, depth=32, patch_size=14)
    full = read_list(raw, "fullatt_block_indexes", (7, 15, 23, 31), int, origin)
    token = shared["merge_size"] * shared["patch_size"]
    with named(origin):
        return QwenVisionConfig(
            width=read_size(raw, "hidden_size", 3584, origin),
            mlp_width=read_size(raw, "intermediate_size", 3420, origin),
            out_width=read_size(raw, "out_hidden_size", 3584, origin),
            activation=read_choice(raw, "hidden_act", "silu", ("silu",), origin),
            window=read_size(raw, "window_size", 112, origin, least=token) // token,
            full_layers=tuple(k for k in range(shared["depth"]) if k in full),
            **shared,
        )


def qwen3_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> QwenVisionConfig:
    """Read `vision_config` of a Qwen3-VL."""
    places = read_size(raw, "num_position_embeddings", 2304, origin)
    side = math.isqrt(places)
    if side**2 != places:
        raise ValueError(f"fastmllm::weights: {origin}: num_position_embeddings {places} is not a square")
    with named(origin):
        return QwenVisionConfig(
            width=read_size(raw, "hidden_size", 1152, origin),
            mlp_width=read_size(raw, "intermediate_size", 4304, origin),
            out_width=read_size(raw, "out_hidden_size", 3584, origin),
            norm="layer",
            activation=ACTIVATIONS[read_choice(raw, "hidden_act", "gelu_pytorch_tanh", ACTIVATIONS, origin)],
            patch_bias=True,
            position_grid=side,
            deepstack_layers=tuple(read_list(raw, "deepstack_visual_indexes", (8, 16, 24), int, origin)),
            **HALF_PIXELS,
            **_shared(raw, origin, depth=27, patch_size=16),
        )


def _shared(raw: Mapping[str, Any], origin: str, depth: int, patch_size: int) -> dict[str, Any]:
    scaling = read_part(raw, "rope_scaling", origin, {})
    rope = scaling or read_part(raw, "rope_parameters", origin, {})
    kind = rope.get("rope_type", rope.get("type", "axial"))
    if kind not in ("axial", "default"):  # transformers reads the second as the first
        raise ValueError(f"fastmllm::weights: {origin}: rope_type {kind!r} is not computed here (axial)")
    return {
        "depth": read_size(raw, _present(raw, "depth", "num_hidden_layers"), depth, origin, most=MOST_LAYERS),
        "num_heads": read_size(raw, _present(raw, "num_heads", "num_attention_heads"), 16, origin),
        "patch_size": read_size(raw, "patch_size", patch_size, origin),
        "temporal_patch_size": read_size(raw, "temporal_patch_size", 2, origin),
        "merge_size": read_size(raw, "spatial_merge_size", 2, origin),
        "channels": read_size(raw, "in_channels", 3, origin),
        "rope_theta": read_number(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0, origin),
    }


def _present(raw: Mapping[str, Any], name: str, other: str) -> str:
    return name if name in raw else other


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
