"""Segments of different lengths as one padded batch, and sums over sets of tokens; nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmllm.kernels._triton import accumulator_dtype


class Padding:
    """Packed rows (T, ...) as a padded batch (S, N, ...), and back; views where all segments are of one length.

    Args:
        seqlens: of the segments, host, at least one above 0.
        device: of the rows.
    """

    def __init__(self, seqlens: Sequence[int], device: torch.device) -> None:
        self.segments, self.width = len(seqlens), max(seqlens)
        self.inside: Tensor | None = None  # (S, N) bool whether there is a row; None: everywhere
        if len(set(seqlens)) > 1:
            lengths = torch.tensor(seqlens, dtype=torch.int64)[:, None]
            place = torch.arange(self.width)[None]
            inside = place < lengths
            row = (lengths.cumsum(0) - lengths + torch.minimum(place, lengths - 1)).clamp(0, sum(seqlens) - 1)
            self.inside = inside.to(device, non_blocking=True)
            self._row = row.flatten().to(device, non_blocking=True)  # behind an end, some row that exists
            self._place = torch.cat([i * self.width + torch.arange(n) for i, n in enumerate(seqlens)]).to(
                device, non_blocking=True
            )

    def pad(self, rows: Tensor) -> Tensor:
        """Return (S, N, ...); behind a segment's end stands what `mask` has to cover."""
        if self.inside is not None:
            rows = rows.index_select(0, self._row)
        return rows.reshape(self.segments, self.width, *rows.shape[1:])

    def unpad(self, batch: Tensor) -> Tensor:
        """Return (T, ...) of (S, N, ...)."""
        rows = batch.flatten(0, 1)
        return rows if self.inside is None else rows.index_select(0, self._place)

    def mask(self, values: Tensor, value: float) -> Tensor:
        """Return (S, ..., N) with `value` behind the end of each segment."""
        if self.inside is None:
            return values
        return values.masked_fill(~self.inside.view(self.segments, *[1] * (values.dim() - 2), -1), value)


def repeat(values: Sequence[int | float | bool], seqlens: Sequence[int], device: torch.device) -> Tensor:
    """Return a segment's value for each of its tokens, (T,)."""
    lengths = torch.tensor(seqlens, dtype=torch.int64)
    return torch.tensor(values).repeat_interleave(lengths, output_size=sum(seqlens)).to(device, non_blocking=True)


def units(rows: Tensor) -> Tensor:
    """Return rows (T, C) of length 1, in fp32 or fp64 and without gradient: what cosines are made of."""
    rows = rows.detach()
    return F.normalize(rows.to(accumulator_dtype(rows.dtype)), dim=-1)


def pooled(x: Tensor, index: Tensor, starts: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean, or the weighted sum, of each set of rows; 0 of an empty set. In order, so without atomics.

    Args:
        x: (T, C); sums are in fp32 or fp64.
        index: (M,) int64 rows of x, set after set.
        starts: (K + 1,) int64 where each set begins in `index`, from 0 to M.
        weight: (M,) for the sums; without gradient. None: means.

    Returns:
        (K, C) in x's dtype.
    """
    wide = x.to(accumulator_dtype(x.dtype))
    if weight is None:
        sums = F.embedding_bag(index, wide, starts, mode="mean", include_last_offset=True)
    else:
        weight = weight.detach().to(wide.dtype)
        sums = F.embedding_bag(index, wide, starts, mode="sum", per_sample_weights=weight, include_last_offset=True)
    return sums.to(x.dtype)


def sets(assign: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Group tokens by the row that they are counted in.

    Args:
        assign: (T,) int64, each in 0..rows-1.
        rows: K.

    Returns:
        `index` and `starts` for `pooled`.
    """
    ordered, index = assign.sort(stable=True)
    return index, torch.searchsorted(ordered, torch.arange(rows + 1, device=assign.device))


def interleaved(first: Sequence[int], second: Sequence[int], device: torch.device) -> Tensor:
    """Return the order that turns all firsts, then all seconds, into the first and the second ones of each segment.

    Args:
        first: how many of each segment, host.
        second: the same of the others.
        device: of the result, (sum,) int64.
    """
    rows, at, behind = [], 0, sum(first)
    for a, b in zip(first, second, strict=True):
        rows += [torch.arange(at, at + a), torch.arange(behind, behind + b)]
        at, behind = at + a, behind + b
    return torch.cat(rows).to(device, non_blocking=True)
