"""Visual-token compression inside of a Hugging Face model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastmllm.compression import Compressor, Placement
from fastmllm.hf.compress.parts import Connector, Head, Owner, TiledOwner, Watched, WatchedKeys
from fastmllm.hf.compress.seams import check, family_of, find, placement_of
from fastmllm.hf.compress.staging import stage_fusions
from fastmllm.hf.compress.state import KEY, Compression
from fastmllm.hf.fusion import Fusion


def compress_fusions(
    model: nn.Module, compress: Placement | Compressor | str | None
) -> Iterator[tuple[str, nn.Module, type[Fusion], dict[str, Any], str | None]]:
    """Yield the modules that take part in compression: name, module, what it computes with, what is kept on it, and
    what the report says of it, if anything.

    Raises:
        ValueError: this model cannot be compressed so.
    """
    if compress is None:
        return
    name, module, seam = find(model)
    placement = placement_of(compress, seam)
    if placement.stages:
        yield from stage_fusions(placement.stages, name, module, seam)
    compressor = placement.connector
    if compressor is None:
        return
    check(compressor, seam, module)
    weight = next(p for p in module.parameters() if p.is_floating_point())
    owner, at, head = module, name, not family_of(module)[1].__name__.endswith("Model")
    if head:
        owner, at = module.model, f"{name}.model".lstrip(".")
        family_of(owner)
    state = Compression(compressor.to(weight), seam, owner, head=module if head else None)
    if head:
        yield name, module, Head, {}, None
    said = f"{compressor.name}, K = {compressor.keep}, {compressor.mode}, {seam.place}"
    yield at, owner, TiledOwner if seam.tiles else Owner, {KEY: state}, said
    if seam.connector is not None:
        yield f"{at}.{seam.connector}".lstrip("."), getattr(owner, seam.connector), Connector, {KEY: state}, None
    if compressor.layer is not None and seam.tower is not None:
        tower = getattr(owner, seam.tower)
        state.cls_token = any(n.endswith("class_embedding") for n, _ in tower.named_parameters())
        yield from _watched(tower, f"{at}.{seam.tower}".lstrip("."), compressor, state)


def _watched(
    tower: Any, at: str, compressor: Compressor, state: Compression
) -> Iterator[tuple[str, nn.Module, type[Fusion], dict[str, Any], None]]:
    """Yield the projections of the layer whose attention is read."""
    layers = [
        (name, module) for name, module in tower.named_modules()
        if re.search(r"(^|\.)layers\.\d+\.self_attn$", name) and hasattr(module, "q_proj") and hasattr(module, "k_proj")
    ]  # fmt: skip
    wanted = compressor.layer
    assert wanted is not None
    if not -len(layers) <= wanted < len(layers):
        raise ValueError(
            f"patch: {compressor.name} judges by the attention of layer {wanted}, but {type(tower).__name__} has "
            f"{len(layers)} whose queries and keys we know"
        )
    name, attention = layers[wanted]
    if attention.scale != attention.head_dim**-0.5:
        raise ValueError(f"patch: {name} of {type(tower).__name__} scales its attention by {attention.scale}")
    state.attention = attention
    kept = {KEY: state}
    yield f"{at}.{name}.q_proj", attention.q_proj, Watched, kept, None
    yield f"{at}.{name}.k_proj", attention.k_proj, WatchedKeys, kept, None
