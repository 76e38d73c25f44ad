"""Checkpoint layouts of the vision encoders: their configurations and tables of names, read in both directions.

Names are transformers' without the tower's prefix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastmllm.models.vision import VisionConfig
from fastmllm.models.weights.mapping import Conv, Form, Join, Positions, Rule, View, expect
from fastmllm.models.weights.values import MOST_LAYERS, named, read_choice, read_flag, read_number, read_size

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
CLIP_PIXELS: Mapping[str, Any] = {
    "pixel_mean": (0.48145466, 0.4578275, 0.40821073),
    "pixel_std": (0.26862954, 0.26130258, 0.27577711),
}
HALF_PIXELS: Mapping[str, Any] = {"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.5, 0.5, 0.5)}


@dataclass(frozen=True, slots=True)
class Transposed(Form):
    """A linear layer's weight (D, K); ours is (K, D)."""

    def pack(self, theirs: list[Tensor]) -> list[Tensor]:
        expect(theirs, -1, -1)
        return [theirs[0].t().contiguous()]

    def unpack(self, ours: list[Tensor]) -> list[Tensor]:
        return [ours[0].t().contiguous()]


# configurations -------------------------------------------------------------------------------------------------------
def clip_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> VisionConfig:
    """Read CLIP's vision configuration; the norm behind the last block is for the class token only, so it is off."""
    return _config(
        raw, origin, {"hidden_size": 768, "intermediate_size": 3072, "patch_size": 32, "hidden_act": "quick_gelu"},
        1e-5, layer_scale=None, patch_bias=False, pre_norm=True, final_norm=False, **CLIP_PIXELS,
    )  # fmt: skip


def idefics_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> VisionConfig:
    """Read the vision configuration of Idefics (v1): CLIP's layout, its positions resampled in no way of ours."""
    defaults = {"hidden_size": 768, "intermediate_size": 5120, "patch_size": 14, "hidden_act": "gelu"}
    raw = {**raw, "hidden_size": raw["embed_dim"]} if "embed_dim" in raw else raw
    return _config(
        raw, origin, defaults | {"num_hidden_layers": 32, "num_attention_heads": 16}, 1e-5,
        layer_scale=None, patch_bias=False, pre_norm=True, final_norm=False, resample="none", **CLIP_PIXELS,
    )  # fmt: skip


def siglip_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> VisionConfig:
    """Read SigLIP's vision configuration, without the pooling head."""
    return _config(
        raw, origin,
        {"hidden_size": 768, "intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"}, 1e-6,
        layer_scale=None, cls_token=False, **HALF_PIXELS,
    )  # fmt: skip


def siglip2_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> VisionConfig:
    """Read the vision configuration of SigLIP2's NaFlex checkpoints (the others are `siglip`)."""
    patches = read_size(raw, "num_patches", 256, origin)
    grid = math.isqrt(patches)
    if grid * grid != patches:
        raise ValueError(f"fastmllm::weights: {origin}: siglip2: num_patches {patches} is not a square")
    raw = {**raw, "image_size": grid * _side(raw, "patch_size", 16, origin)}
    return replace(siglip_vision_config(raw, origin), resample="antialias")


def dinov2_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> VisionConfig:
    """Read DINOv2's configuration."""
    if read_flag(raw, "use_swiglu_ffn", False, origin):
        raise ValueError(f"fastmllm::weights: {origin}: dinov2: use_swiglu_ffn (ViT-g) is not computed here")
    width = read_size(raw, "hidden_size", 768, origin)
    raw = {**raw, "intermediate_size": int(width * read_number(raw, "mlp_ratio", 4, origin))}
    return _config(
        raw, origin, {"hidden_size": 768, "patch_size": 14}, 1e-6, qkv_bias=read_flag(raw, "qkv_bias", True, origin)
    )


def internvl_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> VisionConfig:
    """Read InternVL's vision configuration (InternViT in transformers' layout)."""
    if not read_flag(raw, "use_absolute_position_embeddings", True, origin):
        raise ValueError(
            f"fastmllm::weights: {origin}: use_absolute_position_embeddings false: a tower without positions is not "
            "computed here"
        )
    norm = read_choice(raw, "norm_type", "layer_norm", ("layer_norm", "rms_norm"), origin)
    defaults = {"hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14, "image_size": 448}
    return _config(
        raw, origin, defaults | {"num_hidden_layers": 24, "num_attention_heads": 16}, 1e-6,
        qkv_bias=read_flag(raw, "attention_bias", False, origin), qk_norm=read_flag(raw, "use_qk_norm", False, origin),
        rms_norm=norm == "rms_norm", final_norm=not read_flag(raw, "use_mean_pooling", True, origin),
        layer_scale=read_number(raw, "layer_scale_init_value", 0.1, origin, zero=True),
    )  # fmt: skip


def blip2_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> VisionConfig:
    """Read the vision configuration of BLIP-2 and InstructBLIP (EVA ViT-g)."""
    defaults = {"hidden_size": 1408, "intermediate_size": 6144, "patch_size": 14}
    return _config(
        raw, origin, defaults | {"num_hidden_layers": 39, "num_attention_heads": 16}, 1e-6,
        layer_scale=None, qkv_bias=read_flag(raw, "qkv_bias", True, origin), **CLIP_PIXELS,
    )  # fmt: skip


def eva2_clip_e_vision_config(raw: Mapping[str, Any], origin: str = "config.json") -> VisionConfig:
    """Read `vision_config` of CogVLM and CogAgent (EVA2-CLIP-E, post-norm; its GLU adapter is the connector's)."""
    names = {"num_heads": "num_attention_heads"}
    raw = {names.get(key, key): value for key, value in raw.items()}
    defaults = {"hidden_size": 1792, "intermediate_size": 15360, "patch_size": 14, "num_hidden_layers": 63}
    return _config(
        raw, origin, defaults | {"num_attention_heads": 16}, 1e-6,
        layer_scale=None, post_norm=True, final_norm=False, resample="none", **CLIP_PIXELS,
    )  # fmt: skip


def _config(
    raw: Mapping[str, Any], origin: str, defaults: Mapping[str, Any], eps: float, **variant: Any
) -> VisionConfig:
    """Read the keys that all families share; `defaults` are those of the family's configuration class."""
    get: dict[str, Any] = {"num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "hidden_act": "gelu"}
    get |= {**defaults, **raw}
    if (channels := read_size(get, "num_channels", 3, origin)) != 3:
        raise ValueError(f"fastmllm::weights: {origin}: num_channels {channels} is not computed here (3)")
    width = read_size(get, "hidden_size", None, origin)
    with named(origin):
        return VisionConfig(
            width=width,
            depth=read_size(get, "num_hidden_layers", None, origin, most=MOST_LAYERS),
            num_heads=read_size(get, "num_attention_heads", None, origin),
            mlp_ratio=read_size(get, "intermediate_size", None, origin) / width,
            patch_size=_side(get, "patch_size", None, origin),
            image_size=_side(get, "image_size", None, origin),
            activation=ACTIVATIONS[read_choice(get, "hidden_act", "gelu", ACTIVATIONS, origin)],
            norm_eps=read_number(get, "layer_norm_eps", eps, origin),
            **variant,
        )


def _side(raw: Mapping[str, Any], name: str, default: int | None, origin: str) -> int:
    """Read the side of a square, a number or two that are one."""
    value = raw.get(name, default)
    sides = list(value) if isinstance(value, list | tuple) else [value]
    if not sides or any(type(side) is not int or side != sides[0] for side in sides):
        raise ValueError(f"fastmllm::weights: {origin}: {name} {value!r} is not a square's side")
    return read_size({name: sides[0]}, name, None, origin)


# tables ---------------------------------------------------------------------------------------------------------------
def clip_rules(config: VisionConfig) -> list[Rule]:
    """Return the table of CLIP, and of Idefics (v1)."""
    return [
        Rule("cls_token", "embeddings.class_embedding"),
        Rule(("cls_position", "patch_embed.position"), "embeddings.position_embedding.weight", Positions()),
        Rule("patch_embed.weight", "embeddings.patch_embedding.weight", Conv(config.patch_size)),
        Rule("pre_norm.{p}", "pre_layrnorm.{p}"),
        Rule("norm.{p}", "post_layernorm.{p}"),
        *_block_rules(
            "encoder.layers.{i}.", "self_attn.{part}_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2"
        ),
    ]


def siglip_rules(config: VisionConfig) -> list[Rule]:
    """Return the table of SigLIP; the pooling head's part only where it is built."""
    head = [
        Rule("head.probe", "head.probe", View(ours=(-1,), theirs=(1, 1, -1))),
        Rule(("head.q.weight", "head.kv.weight"), "head.attention.in_proj_weight", QueryApart(config.width)),
        Rule(("head.q.bias", "head.kv.bias"), "head.attention.in_proj_bias", QueryApart(config.width)),
        Rule("head.proj.{p}", "head.attention.out_proj.{p}"),
        Rule("head.norm.{p}", "head.layernorm.{p}"),
        Rule("head.mlp.{p}1", "head.mlp.fc1.{p}"),
        Rule("head.mlp.{p}2", "head.mlp.fc2.{p}"),
    ]
    return [
        Rule("patch_embed.position", "embeddings.position_embedding.weight"),
        Rule("patch_embed.weight", "embeddings.patch_embedding.weight", Conv(config.patch_size)),
        Rule("patch_embed.bias", "embeddings.patch_embedding.bias"),
        Rule("norm.{p}", "post_layernorm.{p}"),
        *_block_rules(
            "encoder.layers.{i}.", "self_attn.{part}_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2"
        ),
        *(head if config.pool else []),
    ]


def siglip2_rules(config: VisionConfig) -> list[Rule]:
    """Return the table of SigLIP2-NaFlex, whose patches are projected by a linear layer."""
    patch = Rule("patch_embed.weight", "embeddings.patch_embedding.weight", Transposed())
    return [patch, *[rule for rule in siglip_rules(config) if rule.ours != patch.ours]]


def dinov2_rules(config: VisionConfig) -> list[Rule]:
    """Return the table of DINOv2: the names that files have, then those of transformers 5 at run time."""
    layer, norms = "encoder.layer.{i}.", ("norm1", "norm2")
    names = {"q": "query", "k": "key", "v": "value"}
    return [
        *_embedding_rules(config, "embeddings.patch_embeddings.projection"),
        Rule("norm.{p}", "layernorm.{p}"),
        Rule(
            "blocks.{i}.attn.qkv.{p}",
            tuple(f"{layer}attention.attention.{names[part]}.{{p}}" for part in "qkv"),
            Join(),
        ),
        Rule("blocks.{i}.attn.proj.{p}", layer + "attention.output.dense.{p}"),
        *_block_rules(layer, "attention.{part}_proj", "attention.o_proj", *norms),
        Rule("blocks.{i}.scale{j}", layer + "layer_scale{j}.lambda1"),
    ]


def internvl_rules(config: VisionConfig) -> list[Rule]:
    """Return the table of InternVL's tower."""
    layer = "encoder.layer.{i}."
    return [
        *_embedding_rules(config, "embeddings.patch_embeddings.projection"),
        Rule("norm.{p}", "layernorm.{p}"),
        *_block_rules(
            layer, "attention.{part}_proj", "attention.projection_layer", "layernorm_before", "layernorm_after"
        ),
        Rule("blocks.{i}.attn.{norm}.weight", layer + "attention.{norm}.weight"),
        Rule("blocks.{i}.scale{j}", layer + "lambda_{j}"),
    ]


def blip2_rules(config: VisionConfig) -> list[Rule]:
    """Return the table of BLIP-2's and InstructBLIP's tower."""
    layer = "encoder.layers.{i}."
    return [
        Rule("cls_token", "embeddings.class_embedding", View(ours=(-1,), theirs=(1, 1, -1))),
        Rule(("cls_position", "patch_embed.position"), "embeddings.position_embedding", Positions(leading=True)),
        Rule("patch_embed.weight", "embeddings.patch_embedding.weight", Conv(config.patch_size)),
        Rule("patch_embed.bias", "embeddings.patch_embedding.bias"),
        Rule("norm.{p}", "post_layernorm.{p}"),
        Rule("blocks.{i}.attn.qkv.{p}", layer + "self_attn.qkv.{p}"),
        *_block_rules(layer, None, "self_attn.projection", "layer_norm1", "layer_norm2"),
    ]


def eva2_clip_e_rules(config: VisionConfig) -> list[Rule]:
    """Return the table of CogVLM's and CogAgent's EVA2-CLIP-E (names under `model.vision.`)."""
    layer = "transformer.layers.{i}."
    return [
        Rule("cls_token", "patch_embedding.cls_embedding", View(ours=(-1,), theirs=(1, -1))),
        Rule(("cls_position", "patch_embed.position"), "patch_embedding.position_embedding.weight", Positions()),
        Rule("patch_embed.weight", "patch_embedding.proj.weight", Conv(config.patch_size)),
        Rule("patch_embed.bias", "patch_embedding.proj.bias"),
        Rule("blocks.{i}.attn.qkv.{p}", layer + "attention.query_key_value.{p}"),
        *_block_rules(layer, None, "attention.dense", "input_layernorm", "post_attention_layernorm"),
    ]


@dataclass(frozen=True, slots=True)
class QueryApart(Form):
    """q, k and v of torch's MultiheadAttention in one tensor; ours are q, and k with v.

    Args:
        width: rows of each.
    """

    width: int

    def pack(self, theirs: list[Tensor]) -> list[Tensor]:
        expect(theirs, 3 * self.width, *theirs[0].shape[1:])
        return [theirs[0][: self.width].clone(), theirs[0][self.width :].clone()]

    def unpack(self, ours: list[Tensor]) -> list[Tensor]:
        return [torch.cat(ours)]


def _embedding_rules(config: VisionConfig, projection: str) -> list[Rule]:
    return [
        Rule("cls_token", "embeddings.cls_token", View(ours=(-1,), theirs=(1, 1, -1))),
        Rule(("cls_position", "patch_embed.position"), "embeddings.position_embeddings", Positions(leading=True)),
        Rule("patch_embed.weight", f"{projection}.weight", Conv(config.patch_size)),
        Rule("patch_embed.bias", f"{projection}.bias"),
    ]


def _block_rules(layer: str, part: str | None, out: str, norm1: str, norm2: str) -> list[Rule]:
    """Return what all blocks share; `part` names q, k and v where they are apart."""
    apart = [] if part is None else [tuple(f"{layer}{part.format(part=p)}.{{p}}" for p in "qkv")]
    return [
        *[Rule("blocks.{i}.attn.qkv.{p}", names, Join()) for names in apart],
        Rule("blocks.{i}.attn.proj.{p}", f"{layer}{out}.{{p}}"),
        Rule("blocks.{i}.norm1.{p}", f"{layer}{norm1}.{{p}}"),
        Rule("blocks.{i}.norm2.{p}", f"{layer}{norm2}.{{p}}"),
        Rule("blocks.{i}.mlp.{p}1", f"{layer}mlp.fc1.{{p}}"),
        Rule("blocks.{i}.mlp.{p}2", f"{layer}mlp.fc2.{{p}}"),
    ]
