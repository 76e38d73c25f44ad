"""The tower of an image path: a frozen one runs without graph, in sub-batches, and not at all where a store knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastmllm.models.feature_store import FeatureStore
    from fastmllm.models.image_path import ImagePath

ENCODED_TOGETHER = 36_864  # patches: 64 images of 336 px in patches of 14
Features = tuple[Tensor, ...]  # rows of each of a tower's outputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A picture whose features a store has: nothing of it is decoded.

    Args:
        size: (width, height) of the upright picture, pixels.
        features: of it.
    """

    size: tuple[int, int]
    features: Features


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Pictures of a batch, some of which need not be encoded.

    Args:
        paths: of the pictures; empty where nobody keeps them.
        sizes: (width, height) of each, pixels.
        patches: rows of the tower for each.
        known: number of a picture -> its features.
        layout: arguments of the image path for all pictures, known or not, without their pixels.
    """

    paths: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    patches: Sequence[int]
    known: Mapping[int, Features]
    layout: Mapping[str, Any]


def entry_of(picture: Known) -> dict[str, Tensor]:
    """Return what a store keeps of a picture."""
    return {"size": torch.tensor(picture.size), **{str(n): rows for n, rows in enumerate(picture.features)}}


def known_from(entry: Mapping[str, Tensor]) -> Known:
    """Read what `entry_of` returned."""
    width, height = entry["size"].tolist()
    return Known(size=(width, height), features=tuple(entry[str(n)] for n in range(len(entry) - 1)))


def encode(path: ImagePath, arguments: Mapping[str, Any]) -> Features:
    """Run a path's tower.

    One that learns, or whose weights are spread over ranks (ZeRO-3), which then must call it equally often, takes all
    at once. Else it runs without graph, on at most `ENCODED_TOGETHER` patches at a time, more only in one picture.

    Args:
        path: with the tower.
        arguments: of its forward.

    Returns:
        Rows of each of its outputs, picture after picture.
    """
    learns = any(param.requires_grad for part in path.towers() for param in part.parameters())
    units = path.units(arguments)
    if learns or is_sharded(path) or sum(units) <= ENCODED_TOGETHER:
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return path.encode(arguments)
    with torch.no_grad():
        parts = [path.encode(path.part(arguments, first, last)) for first, last in _groups(units)]
        return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))


def is_sharded(path: ImagePath) -> bool:
    """Tell whether a tower's weights are spread over ranks."""
    return any(hasattr(param, "ds_id") for part in path.towers() for param in part.parameters())


def encode_unknown(
    path: ImagePath, arguments: Mapping[str, Any] | None, stored: Stored, store: FeatureStore | None, device: Any
) -> Features:
    """Encode the pictures that no store knew, keep what is new, and return the features of all.

    Args:
        path: with the tower.
        arguments: of its forward for those pictures; None where all are known.
        stored: what is known.
        store: where the others go, or None.
        device: of the result.

    Returns:
        As `encode`, of all pictures in their order.
    """
    found = dict(stored.known)
    missing = [number for number in range(len(stored.sizes)) if number not in found]
    if arguments is not None:
        made = split(encode(path, arguments), [stored.patches[number] for number in missing])
        for number, features in zip(missing, made, strict=True):
            found[number] = features
            if store is not None and stored.paths:
                picture = Known(size=stored.sizes[number], features=features)
                store.keep(stored.paths[number], entry_of(picture))
    elif is_sharded(path):  # as other ranks do
        blank = {name: _on(value, device) for name, value in path.blank().items()}
        encode(path, blank)
    each = [found[number] for number in range(len(stored.sizes))]
    return tuple(torch.cat([rows.to(device) for rows in outputs]) for outputs in zip(*each, strict=True))


def split(features: Features, patches: Sequence[int]) -> list[Features]:
    """Part rows by picture; each output has as many rows a patch in every picture."""
    total = sum(patches)
    each = [rows.split([len(rows) * n // total for n in patches]) for rows in features]
    return list(zip(*each, strict=True))


def cut(rows: Tensor, units: Sequence[int], first: int, last: int) -> Tensor:
    """Return what units first .. last - 1 have of a packed tensor that is as long as their patches, or a multiple."""
    total = sum(units)
    start, stop = (len(rows) * sum(units[:end]) // total for end in (first, last))
    return rows[start:stop]


def _groups(units: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of neighbouring units that are encoded together."""
    bounds = [0, *accumulate(units)]
    first = 0
    for unit in range(1, len(units)):
        if bounds[unit + 1] - bounds[first] > ENCODED_TOGETHER:
            yield first, unit
            first = unit
    yield first, len(units)


def _on(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
