"""Vision towers in and out of checkpoints: the layouts by name, one reader and one writer for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmllm.models.vision import Source, VisionConfig, VisionTransformer
from fastmllm.models.weights.mapping import Rule, Shape, fill, their_name, to_ours, to_theirs
from fastmllm.models.weights.tower_layouts import (
    blip2_rules,
    blip2_vision_config,
    clip_rules,
    clip_vision_config,
    dinov2_rules,
    dinov2_vision_config,
    eva2_clip_e_rules,
    eva2_clip_e_vision_config,
    idefics_vision_config,
    internvl_rules,
    internvl_vision_config,
    siglip2_rules,
    siglip2_vision_config,
    siglip_rules,
    siglip_vision_config,
)
from fastmllm.models.weights.values import named


@dataclass(frozen=True, slots=True)
class Family:
    """One checkpoint layout.

    Args:
        config: reads config.json, or its `vision_config`, and has a name for it in messages.
        rules: the table for a configuration.
        norm_unused: the file holds a final norm that the family does not apply to all tokens.
        unused: patterns of names that no encoder here computes with, and their shapes for a configuration.
    """

    config: Callable[[Mapping[str, Any], str], VisionConfig]
    rules: Callable[[VisionConfig], list[Rule]]
    norm_unused: bool = False
    unused: Callable[[VisionConfig], dict[str, Shape]] = lambda config: {}


def _head(config: VisionConfig) -> dict[str, Shape]:
    """Name what SigLIP's pooling head has."""
    width, inner = config.width, config.mlp_width
    attn, mlp = "head.attention.", "head.mlp."
    return {
        "head.probe": (1, 1, width), "head.layernorm.{p}": (width,),
        f"{attn}in_proj_weight": (3 * width, width), f"{attn}in_proj_bias": (3 * width,),
        f"{attn}out_proj.weight": (width, width), f"{attn}out_proj.bias": (width,),
        f"{mlp}fc1.weight": (inner, width), f"{mlp}fc1.bias": (inner,),
        f"{mlp}fc2.weight": (width, inner), f"{mlp}fc2.bias": (width,),
    }  # fmt: skip


_MASK = "embeddings.mask_token"
_IDS: dict[str, Shape] = {"embeddings.position_ids": (1, -1)}
_CLIP = Family(clip_vision_config, clip_rules, norm_unused=True, unused=lambda config: _IDS)
_SIGLIP = Family(siglip_vision_config, siglip_rules, unused=lambda config: _IDS | _head(config))
_SIGLIP2 = Family(siglip2_vision_config, siglip2_rules, unused=_head)
_BLIP2 = Family(blip2_vision_config, blip2_rules)
FAMILIES: Mapping[str, Family] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "dinov2": Family(dinov2_vision_config, dinov2_rules, unused=lambda c: {_MASK: (1, c.width)}),
    "internvl_vision": Family(internvl_vision_config, internvl_rules, unused=lambda c: {_MASK: (1, 1, c.width)}),
    "blip_2_vision_model": _BLIP2,
    "instructblip_vision_model": _BLIP2,
    "idefics_vision": replace(_CLIP, config=idefics_vision_config),
    "eva2_clip_e": Family(eva2_clip_e_vision_config, eva2_clip_e_rules),
}


def family_of(kind: object, origin: str) -> Family:
    """Find a layout by its model_type.

    Raises:
        ValueError: no encoder here has it.
    """
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"fastmllm::weights: {origin}: model_type {kind!r} is none of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """An encoder as a checkpoint has it.

    Args:
        config: of the encoder that is built.
        whole: of one with everything that files hold: the blocks behind the layer used, a norm that is not applied.
        rules: its table.
        unused: patterns of names beside these, and their shapes.
    """

    config: VisionConfig
    whole: VisionConfig
    rules: list[Rule]
    unused: dict[str, Shape]


def describe_stored(
    raw: Mapping[str, Any], origin: str, *, kind: str | None = None, changes: Mapping[str, Any] | None = None
) -> Stored:
    """Read a tower's configuration; the arguments of `read_tower`.

    Raises:
        ValueError: an unknown family or variant.
    """
    family = family_of(kind or raw.get("model_type"), origin)
    stored = family.config(raw, origin)
    with named(origin):
        config = replace(stored, **(changes or {}))
    whole = replace(config, layer=None, final_norm=stored.final_norm or family.norm_unused)
    return Stored(config=config, whole=whole, rules=family.rules(config), unused=family.unused(config))


def take_spare(
    ours: dict[str, Tensor],
    model: VisionTransformer,
    whole: VisionConfig,
    origin: str,
    prefix: str = "",
    their: Callable[[str], str] = lambda name: name,
) -> dict[str, Tensor]:
    """Take what a checkpoint holds of an encoder beyond what is built out of its tensors.

    Args:
        ours: the checkpoint's tensors, under our names; what is taken goes.
        model: the encoder that is built.
        whole: as in `Stored`.
        origin: what the messages call the checkpoint.
        prefix: of the encoder's names.
        their: what the messages call a tensor of ours, prefix included.

    Returns:
        The tensors that the encoder lacks, with the prefix: to be written back, so they must be sound too.

    Raises:
        ValueError: a tensor of the whole encoder is missing, of another shape, or unknown.
    """
    with torch.device("meta"):
        complete = VisionTransformer(whole)
    inside = {name.removeprefix(prefix): tensor for name, tensor in ours.items() if name.startswith(prefix)}
    fill(complete, inside, origin, lambda name: their(prefix + name))
    own = model.state_dict()
    return {prefix + name: ours.pop(prefix + name) for name in inside if name not in own}


def read_tower(
    raw: Mapping[str, Any],
    state: Mapping[str, Tensor],
    origin: str,
    *,
    kind: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> VisionTransformer:
    """Build a tower from its part of a checkpoint.

    Args:
        raw: config.json, or its `vision_config`.
        state: the tower's tensors under transformers' names without the tower's prefix.
        origin: what the messages call the checkpoint.
        kind: the model_type where `raw` has none (older files, CogAgent).
        changes: fields of VisionConfig that differ from the family's, such as `layer`, `final_norm`, `pool`.

    Returns:
        The encoder in eval mode; what it does not compute with is in `source.rest`, under the checkpoint's names.

    Raises:
        ValueError: an unknown family or variant; a tensor is missing, of another shape, or unknown.
    """
    stored = describe_stored(raw, origin, kind=kind, changes=changes)
    ours, rest = to_ours(state, stored.rules, origin, stored.unused)
    with torch.device("meta"):
        model = VisionTransformer(stored.config)
    their = partial(their_name, rules=stored.rules)
    spare = take_spare(ours, model, stored.whole, origin, their=their)
    fill(model, ours, origin, their)
    model.source = Source(kind or str(raw.get("model_type")), raw, rest=to_theirs(spare, stored.rules, rest))
    return model.eval()


def tower_state(model: VisionTransformer) -> dict[str, Tensor]:
    """Return a tower's tensors under the names of the checkpoint that it was read from, and what was kept apart.

    Raises:
        ValueError: it was not read from one.
    """
    if model.source is None:
        raise ValueError("fastmllm::weights: this encoder was not read from a checkpoint, so it has no layout to write")
    rules = family_of(model.source.kind, "this encoder").rules(model.config)
    theirs = to_theirs(model.state_dict(), rules)
    return {model.source.prefix + name: tensor for name, tensor in theirs.items()} | dict(model.source.rest)
