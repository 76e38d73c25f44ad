"""Which keys each row of a mask sees, as one span a row: what `cross_attention` takes in place of the mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmllm.hf.fusion import STATE


class Spans(NamedTuple):
    """The keys of each row.

    Args:
        start: (B, T) int32, the first key that a row sees, among those of its sample.
        stop: (B, T) int32, the key behind the last one.
        order: (B, N), in which order a sample's keys have to be taken for that, or None for their own.
        whole: every row sees every key.
    """

    start: Tensor
    stop: Tensor
    order: Tensor | None
    whole: bool = False


def spans(mask: Tensor, reorder: bool) -> Spans | None:
    """Return the spans of a mask that is the same for all heads, or None where one a row does not say it.

    Args:
        mask: (B, 1, T, N), true or 0 where a row sees a key, false or the lowest number elsewhere.
        reorder: keys may be taken in another order: those that only rows without a choice see come last.

    They live on the mask, which all layers of a forward share: the host reads one flag a forward, two with an order.
    """
    version = 0 if mask.is_inference() else mask._version  # inference tensors count no writes
    found = mask.__dict__.get(STATE + "spans")
    if found is None or found[:2] != (version, reorder):
        found = mask.__dict__[STATE + "spans"] = (version, reorder, _read(mask[:, 0], reorder))
    return found[2]


def _read(mask: Tensor, reorder: bool) -> Spans | None:
    seen = mask if mask.dtype == torch.bool else mask == 0
    start, stop, count = _ends(seen)
    # a row that sees nothing, which by softmax sees everything, has ends N apart and a count of 0: no span
    valid = seen.new_ones(()) if mask.dtype == torch.bool else (seen | (mask <= torch.finfo(mask.dtype).min)).all()
    fits, whole = torch.stack([valid & (stop - start == count).all(), (count == seen.shape[-1]).all()]).tolist()
    if fits:
        return Spans(start.int(), stop.int(), None, whole)
    if not reorder:
        return None
    chosen = (seen & (count < seen.shape[-1])[..., None]).any(1)  # (B, N): a row that sees all tells nothing apart
    order = chosen.logical_not().to(torch.uint8).argsort(stable=True)
    start, stop, count = _ends(seen.gather(-1, order[:, None].expand_as(seen)))
    return Spans(start.int(), stop.int(), order) if bool(valid & (stop - start == count).all()) else None


def _ends(seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each row the first key that it sees, the one behind the last, and how many it sees."""
    bits = seen.to(torch.uint8)
    return bits.argmax(-1), seen.shape[-1] - bits.flip(-1).argmax(-1), bits.sum(-1, dtype=torch.int32)
