"""Packed images of different sizes: their table of grids, made on the host and read by kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._runs import upload
from ._triton import tl, triton


def segments(op: str, grid_thw: Sequence[Sequence[int]] | Tensor) -> list[tuple[int, int]]:
    """Return (rows, columns) of every frame: each frame is a segment of its own, as in transformers' cu_seqlens."""
    if isinstance(grid_thw, Tensor):
        if grid_thw.device.type != "cpu":
            raise ValueError(f"fastmllm::{op}: grid_thw is on {grid_thw.device}, but sizes are read on the host: "
                             "pass the list it was made of")  # fmt: skip
        grid_thw = grid_thw.tolist()
    found: list[tuple[int, int]] = []
    for grid in grid_thw:
        if len(grid) not in (2, 3) or min(grid) < 0:
            raise ValueError(f"fastmllm::{op}: a grid must be (h, w) or (t, h, w) patches, but one is {tuple(grid)}")
        found.extend([(grid[-2], grid[-1])] * (grid[0] if len(grid) == 3 else 1))
    return found


def grid_table(sizes: Sequence[tuple[int, int]], prefix_rows: int, device: torch.device) -> Tensor:
    """Return (4, S + 1) int32: first patch, rows, columns of each segment, and cu_seqlens with the prefix rows.

    To be read only: whoever has the same grids has the same table.
    """
    starts, packed = [0], [0]
    for h, w in sizes:
        starts.append(starts[-1] + h * w)
        packed.append(packed[-1] + h * w + prefix_rows)
    rows = [starts, [h for h, _ in sizes] + [0], [w for _, w in sizes] + [0], packed]
    return upload(tuple(value for row in rows for value in row), device).view(4, len(starts))


@triton.jit
def find_segment(rows, starts_ptr, S, BITS: tl.constexpr):
    """Return the last segment that starts at or before each row, S < 2**BITS; empty ones are passed over."""
    found = tl.zeros(rows.shape, tl.int32)
    for bit in tl.static_range(BITS):
        step = found + (1 << (BITS - 1 - bit))
        start = tl.load(starts_ptr + step, mask=step < S, other=2147483647)
        found = tl.where((step < S) & (start <= rows), step, found)
    return found


@triton.jit
def patch_place(patch, columns, MERGE: tl.constexpr):
    """Return row and column of a patch; MERGE x MERGE neighbours follow each other, blocks go row by row."""
    if MERGE == 1:
        return patch // columns, patch % columns
    block, inside = patch // (MERGE * MERGE), patch % (MERGE * MERGE)
    across = columns // MERGE
    return block // across * MERGE + inside // MERGE, block % across * MERGE + inside % MERGE
