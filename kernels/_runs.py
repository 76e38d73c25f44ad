"""What the operators on packed token grids share: grids given on the host, their table on the device, the search in it.

A batch of images is a list of runs (images, height, width): `grid_thw`, with equal neighbours joined. What the
host knows goes to the device from pinned memory: a copy from pageable memory makes the host wait, and no CUDA graph can
hold one. A table is uploaded once a set of grids and kept: a model of fixed resolution uploads it once.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import tl, triton

Grid = Sequence[Sequence[int]] | Tensor
KEPT = 256  # tables that eager calls share, the ones used last
Key = tuple[tuple[int, ...], torch.device, int]  # values, device, stream
_lock = threading.Lock()
_kept: OrderedDict[Key, Tensor] = OrderedDict()
# What a CUDA graph reads. A graph holds an address and no reference, and does not say when it dies: these stay for
# good. One set of numbers costs a few hundred bytes, whatever the number of graphs.
_captured: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


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


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on the device, without a wait of the host; into a CUDA graph nothing can be copied."""
    target = torch.device(device)
    if target.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(target, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():  # a replay would copy anew, from memory that is long another's
        raise RuntimeError(f"fastmllm: a tensor {tuple(tensor.shape)} of the host inside of a CUDA graph capture: move "
                           "it to the device before")  # fmt: skip
    return tensor.pin_memory().to(target, non_blocking=True)


def upload(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the values as int32 on the device, to be read only; the host asks once for the same values.

    A table that a CUDA graph capture took is never freed; of the others the KEPT used last stay. A capture takes what
    was uploaded on any stream before it, because `torch.cuda.graph` begins with a synchronisation.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.int32, device=device)
    return _upload(values, device, torch.cuda.current_stream(device).cuda_stream)


def _upload(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Look the values up; the stream is part of the key, so that whoever reads a table comes after its copy."""
    key = (values, device, stream)
    with _lock:
        table = _captured.get(key[:2])
        if torch.cuda.is_current_stream_capturing():
            if table is None:
                table = next((t for k, t in _kept.items() if k[:2] == key[:2]), None)
            if table is None:
                raise RuntimeError("fastmllm: new token grids inside of a CUDA graph capture: run the call once before")
            return _captured.setdefault(key[:2], table)
        table = _kept.get(key)
        if table is None:
            with torch.inference_mode(False):  # a later call may save it for its backward
                table = _kept[key] = to_device(torch.tensor(values, dtype=torch.int32), device)
        _kept.move_to_end(key)
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
        return table


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
