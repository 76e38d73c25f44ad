"""Visual-token compression inside of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastmllm.compression import BipartiteMerge, Compressor, Placement
from fastmllm.hf.compress.crossed import crossed, find_crossed
from fastmllm.hf.compress.fitting import check
from fastmllm.hf.compress.merging import merging
from fastmllm.hf.compress.parts import Connector, Head, owner_of
from fastmllm.hf.compress.seams import family_of, find, placement_of
from fastmllm.hf.compress.stages import STAGES
from fastmllm.hf.compress.staging import stage_fusions
from fastmllm.hf.compress.state import KEY, Compression
from fastmllm.hf.compress.watch import watched
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
    if placement.stages:
        yield from stage_fusions(placement.stages, name, module, seam)
    compressor, inside = placement.connector, placement.merge is not None
    if placement.merge is not None:
        compressor = BipartiteMerge(placement.merge, position="renumber")
    if compressor is None:
        return
    check(compressor, seam, module)
    weight = next(p for p in module.parameters() if p.is_floating_point())
    if seam.crossed:
        yield from crossed(name, module, Compression(compressor.to(weight), seam, module), compressor)
        return
    owner, at, head = module, name, not family_of(module)[1].__name__.endswith("Model")
    if head:
        owner, at = module.model, f"{name}.model".lstrip(".")
        family_of(owner)
    state = Compression(compressor.to(weight), seam, owner, head=module if head else None, inside=inside)
    if head:
        yield name, module, Head, {}, None
    place = f"inside of {seam.tower}" if inside else seam.place
    said = f"{compressor.name}, K = {compressor.keep}, {compressor.mode}, {place}"
    yield at, owner, owner_of(seam), {KEY: state}, said
    if inside and seam.tower is not None:
        yield from merging(getattr(owner, seam.tower), f"{at}.{seam.tower}".lstrip("."), compressor, state)
        return
    if seam.connector is not None:
        yield f"{at}.{seam.connector}".lstrip("."), getattr(owner, seam.connector), Connector, {KEY: state}, None
    if compressor.layer is not None and seam.tower is not None:
        tower = getattr(owner, seam.tower)
        yield from watched(tower, f"{at}.{seam.tower}".lstrip("."), compressor, state)


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
            yield state.compressor
        if STAGES in module.__dict__:
            yield from (compressor for _, compressor in module.__dict__[STAGES].stages)
