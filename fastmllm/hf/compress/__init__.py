"""Visual-token compression inside of a Hugging Face model: `patch(model, compress=...)`.

Tokens of images go in two places, which one object knows, `Compression` in `state`; the modules that take part have it
beside their parameters:

- in front of the text, where the model makes image features. Ids, labels, mask and positions are rewritten before the
  language model sees them, and `generate` takes the prompt so, because transformers measures a text by the first
  layer's cache. What is left counts its positions anew, or keeps them with M-RoPE;
- in front of layers of the language model ("stages"). The text goes in as it was given, and rows are taken out on the
  way: positions stay, every group of layers has its own mask and its own length of cache.

| what | file |
|---|---|
| families, and where each makes visual tokens | `seams` |
| what is asked for, and whether it fits | `fitting` |
| one model's compression, and a call's | `state` |
| the model without head and with it; its `generate` | `owner`, `generation` |
| images and videos: encoded, compressed, told apart | `features`, `media` |
| in front of the text: connector, tower, cross-attention | `connector`, `merging`, `crossed` |
| the text without what is gone | `rows`, `text` |
| in front of layers: what is planned, done, and seen | `prompt`, `layers`, `passes`, `masks` |
| attention that tokens are judged by, or given relevance | `listening`, `scores`, `given` |
| what lies beside a cache | `cached` |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastmllm.compression import BipartiteMerge, Compressor, Placement
from fastmllm.hf.compress.connector import connected
from fastmllm.hf.compress.crossed import crossed, find_crossed
from fastmllm.hf.compress.fitting import check, has_class_token, placement_of
from fastmllm.hf.compress.layers import staged, take_stages
from fastmllm.hf.compress.listening import listener_of
from fastmllm.hf.compress.owner import Head, owner_of
from fastmllm.hf.compress.seams import KEY, family_of, find
from fastmllm.hf.compress.state import Compression
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
    name, module, seam = find_crossed(model) or find(model)
    placement = placement_of(compress, seam)
    head = not seam.crossed and not family_of(module)[1].__name__.endswith("Model")
    owner, at = (module.model, f"{name}.model".lstrip(".")) if head else (module, name)
    family_of(owner)
    state = Compression(seam, owner, module if head else None)
    if placement.stages:
        take_stages(state, placement.stages)
    if placement.merge is not None or placement.connector is not None:
        _take(state, placement, module)
    if seam.crossed:
        yield from crossed(state, model, name)
        return
    if head:
        yield name, module, Head, {}, None
    yield at, owner, owner_of(state), {KEY: state}, state.said
    if state.compressor is not None:
        yield from connected(state, model, at)
    if state.stages:
        yield from staged(state, f"{at}.{seam.text}".lstrip("."))


def _take(state: Compression, placement: Placement, model: Any) -> None:
    """Let a model compress in front of its text, or of its cross-attention."""
    compressor, seam = placement.connector, state.seam
    if placement.merge is not None:
        compressor, state.inside = BipartiteMerge(placement.merge, position="renumber"), True
    assert compressor is not None
    check(compressor, seam, model)
    state.compressor = compressor.to(next(p for p in model.parameters() if p.is_floating_point()))
    if compressor.layer is not None and not state.inside and seam.tower is not None:
        tower = getattr(state.owner, seam.tower)
        state.tower, state.cls_token = listener_of(tower, compressor), has_class_token(tower)


def check_learns(model: nn.Module, optimizer: Any) -> None:
    """Refuse an optimizer without the weights of a model's compressor: they would stay as they were drawn.

    Raises:
        ValueError: says so.
    """
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        return
    held = {id(p) for group in groups for p in group["params"]}
    for compressor in _compressors(model):
        lost = [name for name, p in compressor.named_parameters() if p.requires_grad and id(p) not in held]
        if not lost:
            continue
        raise ValueError(
            f"compress: the optimizer lacks {len(lost)} weights of {compressor.name} ({lost[0]}, ...), which are "
            "none of the model's: patch the model first, and give Trainer(optimizers=...) one that has "
            "compressor.parameters() too, or freeze them"
        )


def _compressors(model: nn.Module) -> Iterator[Compressor]:
    """Yield what compresses in a patched model; modules share it."""
    for module in model.modules():
        if isinstance(state := module.__dict__.get(KEY), Compression):
            yield from (c for c in (state.compressor, *(c for _, c in state.stages)) if c is not None)
