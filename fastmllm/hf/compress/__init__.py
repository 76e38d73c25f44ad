"""Visual-token compression inside of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastmllm.compression import Compressor, Placement
from fastmllm.hf.compress.crossed import crossed, find_crossed
from fastmllm.hf.compress.merging import merging
from fastmllm.hf.compress.parts import Connector, Head, Owner, TiledOwner
from fastmllm.hf.compress.seams import check, compressor_of, family_of, find
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
    compressor, inside = compressor_of(compress, seam)
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
    yield at, owner, TiledOwner if seam.tiles else Owner, {KEY: state}, said
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
    states = (module.__dict__[KEY] for module in model.modules() if KEY in module.__dict__)
    groups = getattr(optimizer, "param_groups", None)
    if groups is None or (state := next(states, None)) is None:
        return
    held = {id(p) for group in groups for p in group["params"]}
    if lost := [name for name, p in state.compressor.named_parameters() if p.requires_grad and id(p) not in held]:
        raise ValueError(
            f"compress: the optimizer lacks {len(lost)} weights of {state.compressor.name} ({lost[0]}, ...), which are "
            "none of the model's: patch the model first, and give Trainer(optimizers=...) one that has "
            "compressor.parameters() too, or freeze them"
        )
