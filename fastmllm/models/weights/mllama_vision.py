"""Checkpoint layout of Llama-3.2-Vision's tower: configuration and names.

Names have no prefix; in a checkpoint it is "vision_model." (files) or "model.vision_model." (transformers 5 at run
time), and the linear layer behind the tower is "multi_modal_projector" beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmllm.models.mllama_vision import ASPECT_RATIOS, MllamaVisionConfig
from fastmllm.models.weights.mapping import Conv, Join, Rule, View
from fastmllm.models.weights.tower_layouts import ACTIVATIONS
from fastmllm.models.weights.values import (
    MOST_LAYERS,
    named,
    read_choice,
    read_list,
    read_number,
    read_pairs,
    read_size,
)


def mllama_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> MllamaVisionConfig:
    """Read `vision_config`; what it leaves out has transformers' defaults.

    Raises:
        ValueError: an activation that is not computed here, values of another kind, or sizes that do not fit.
    """
    heads = "attention_heads" if "attention_heads" in raw else "num_attention_heads"
    with named(origin):
        config = MllamaVisionConfig(
            width=read_size(raw, "hidden_size", 1280, origin),
            depth=read_size(raw, "num_hidden_layers", 32, origin, most=MOST_LAYERS),
            global_depth=read_size(raw, "num_global_layers", 8, origin, most=MOST_LAYERS),
            num_heads=read_size(raw, heads, 16, origin),
            mlp_width=read_size(raw, "intermediate_size", 5120, origin),
            layers=tuple(read_list(raw, "intermediate_layers_indices", (3, 7, 15, 23, 30), int, origin)),
            tile_size=read_size(raw, "image_size", 448, origin),
            patch_size=read_size(raw, "patch_size", 14, origin),
            channels=read_size(raw, "num_channels", 3, origin),
            max_tiles=read_size(raw, "max_num_tiles", 4, origin),
            aspect_ratios=read_pairs(raw, "supported_aspect_ratios", ASPECT_RATIOS, origin),
            activation=ACTIVATIONS[read_choice(raw, "hidden_act", "gelu", ACTIVATIONS, origin)],
            norm_eps=read_number(raw, "norm_eps", 1e-5, origin),
        )
    stated = read_size(raw, "vision_output_dim", 7680, origin)
    if stated != config.out_width:
        raise ValueError(
            f"fastmllm::weights: {origin}: vision_output_dim {stated} is not hidden_size {config.width} * (1 + "
            f"{len(config.layers)} intermediate_layers_indices) = {config.out_width}"
        )
    return config


def mllama_vision_rules(config: MllamaVisionConfig) -> list[Rule]:
    """Return the tower's table of names."""
    tiles, tokens, width = config.max_tiles, config.tile_tokens, config.width
    per_tile = View(ours=(-1, tiles, width), theirs=(-1, tiles * width))
    positions = View(ours=(-1, tiles, tokens, width), theirs=(-1, tiles * tokens * width))
    return [
        Rule("cls_token", "class_embedding"),
        Rule("patch_embed.weight", "patch_embedding.weight", Conv(config.patch_size, channels=config.channels)),
        Rule("position", "gated_positional_embedding.embedding"),
        Rule("position_gate", "gated_positional_embedding.gate"),
        Rule("tile_position", "gated_positional_embedding.tile_embedding.weight", positions),
        Rule("{side}_tile", "{side}_tile_positional_embedding.embedding.weight", per_tile),
        Rule("{side}_tile_gate", "{side}_tile_positional_embedding.gate"),
        Rule("{side}_norm.{p}", "layernorm_{side}.{p}"),
        *_block_rules("blocks.{i}.", "transformer.layers.{i}."),
        *_block_rules("global_blocks.{i}.", "global_transformer.layers.{i}."),
        Rule("global_blocks.{i}.attn_gate", "global_transformer.layers.{i}.gate_attn"),
        Rule("global_blocks.{i}.mlp_gate", "global_transformer.layers.{i}.gate_ffn"),
    ]


def _block_rules(ours: str, theirs: str) -> list[Rule]:
    qkv = tuple(f"{theirs}self_attn.{part}_proj.weight" for part in "qkv")
    return [
        Rule(f"{ours}attn.qkv.weight", qkv, Join()),
        Rule(f"{ours}attn.proj.weight", f"{theirs}self_attn.o_proj.weight"),
        Rule(f"{ours}norm1.{{p}}", f"{theirs}input_layernorm.{{p}}"),
        Rule(f"{ours}norm2.{{p}}", f"{theirs}post_attention_layernorm.{{p}}"),
        Rule(f"{ours}mlp.{{p}}1", f"{theirs}mlp.fc1.{{p}}"),
        Rule(f"{ours}mlp.{{p}}2", f"{theirs}mlp.fc2.{{p}}"),
    ]
