"""What the operators on packed token grids share: grids given on the host, their table on the device, the search in it.

A batch of images is a list of runs (images, height, width): `grid_thw`, with equal neighbours joined. The table is
uploaded once a set of grids, without waiting for the device, and kept: a model of fixed resolution uploads it once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import tl, triton

Grid = Sequence[Sequence[int]] | Tensor


def image_runs(op: str, x: Tensor, grid: Grid | None) -> list[tuple[int, int, int]]:
    """Return (images, height, width) of each entry of the grids of `x`, (M, D) or (I, N, D), checked against it."""
    if grid is None:
        side = math.isqrt(x.shape[1]) if x.dim() == 3 else -1
        if side * side != x.shape[1]:
            raise ValueError(f"fastmllm::{op}: x {tuple(x.shape)} is no batch of square grids: pass grid")
        return [(x.shape[0], side, side)]
    if isinstance(grid, Tensor):
        if grid.device.type != "cpu":
            raise ValueError(f"fastmllm::{op}: grid is on {grid.device}, but sizes are read on the host: pass a list")
        grid = grid.tolist()
    runs = [tuple(entry) if len(entry) == 3 else (1, *entry) for entry in grid]
    if x.dim() == 3 and len(runs) == 1:
        runs = [(x.shape[0] * runs[0][0], *runs[0][1:])]
    for run in runs:
        if len(run) != 3 or min(run) < 0:
            raise ValueError(f"fastmllm::{op}: a grid must be (h, w) or (t, h, w), but one is {run}")
    tokens = sum(t * h * w for t, h, w in runs)
    if tokens != x.shape[:-1].numel():
        raise ValueError(f"fastmllm::{op}: x {tuple(x.shape)} has {x.shape[:-1].numel()} tokens, its grids {tokens}")
    return runs  # type: ignore[return-value]


def join_runs(runs: Sequence[tuple[int, ...]]) -> list[int]:
    """Join neighbours that differ only in their first number, drop what has no tokens, and flatten."""
    joined: list[list[int]] = []
    for count, *rest in runs:
        if count == 0 or rest[0] == 0 or rest[1] == 0:
            continue
        if joined and joined[-1][1:] == rest:
            joined[-1][0] += count
        else:
            joined.append([count, *rest])
    return [value for run in joined for value in run]


def upload(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the values as int32 on the device; the host does not wait, and asks once for the same values."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int32).to(device)
    return _upload(values, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=256)
def _upload(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Copy from pinned memory; the stream is part of the key, so that whoever reads it comes after the copy."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("fastmllm: new token grids inside of a CUDA graph capture: run the call once before it")
    return torch.tensor(values, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)


@triton.jit
def find_run(starts_ptr, rows, num_runs, STEPS: tl.constexpr):
    """Return the run that each row lies in; STEPS halvings of num_runs + 1 rising starts."""
    low = (rows * 0).to(tl.int32)
    high = low + num_runs
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        above = tl.load(starts_ptr + middle) <= rows
        low = tl.where(above, middle, low)
        high = tl.where(above, high, middle)
    return low
