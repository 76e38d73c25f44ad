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


def mllama_vision_config(raw: Mapping[str, Any]) -> MllamaVisionConfig:
    """Read `vision_config`; what it leaves out has transformers' defaults.

    Raises:
        ValueError: an activation that is not computed here, or sizes that do not fit.
    """
    activation = raw.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"fastmllm::weights: mllama: hidden_act {activation!r} is not computed here ({', '.join(ACTIVATIONS)})"
        )
    for name in ("image_size", "patch_size"):
        if not isinstance(raw.get(name, 1), int):
            raise ValueError(f"fastmllm::weights: mllama: {name} {raw[name]} is not one whole number")
    ratios = raw.get("supported_aspect_ratios")
    layers = raw.get("intermediate_layers_indices")
    config = MllamaVisionConfig(
        width=raw.get("hidden_size", 1280),
        depth=raw.get("num_hidden_layers", 32),
        global_depth=raw.get("num_global_layers", 8),
        num_heads=raw.get("attention_heads", raw.get("num_attention_heads", 16)),
        mlp_width=raw.get("intermediate_size", 5120),
        layers=(3, 7, 15, 23, 30) if layers is None else tuple(layers),
        tile_size=raw.get("image_size", 448),
        patch_size=raw.get("patch_size", 14),
        channels=raw.get("num_channels", 3),
        max_tiles=raw.get("max_num_tiles", 4),
        aspect_ratios=ASPECT_RATIOS if ratios is None else tuple((rows, columns) for rows, columns in ratios),
        activation=ACTIVATIONS[activation],
        norm_eps=raw.get("norm_eps", 1e-5),
    )
    stated = raw.get("vision_output_dim", 7680)
    if stated != config.out_width:
        raise ValueError(
            f"fastmllm::weights: mllama: vision_output_dim {stated} is not hidden_size {config.width} * (1 + "
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
