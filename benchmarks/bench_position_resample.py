"""position_resample against interpolation image by image, and against gathered taps as transformers does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.kernels._grids import grid_table
from fastmllm.kernels.position_resample import (
    position_resample,
    position_resample_bwd_triton,
    position_resample_triton,
)

CUDA = torch.cuda.is_available()
# side of the table, width, grids, merge, options: Qwen3-VL, DINOv2-L at other sizes, SigLIP2-NaFlex
QWEN = {"mode": "bilinear", "align_corners": True}
NAFLEX = {"mode": "bilinear", "antialias": True}
CASES = [
    ("Qwen3-VL", 48, 1152, [(32, 44), (44, 32), (64, 64)] * 8, 2, QWEN),
    ("DINOv2-L", 37, 1024, [(16, 16)], 1, {"mode": "bicubic"}),
    ("DINOv2-L packed", 37, 1024, [(16, 16), (24, 32), (48, 36)] * 8, 1, {"mode": "bicubic"}),
    ("SigLIP2-NaFlex", 16, 768, [(16, 16), (12, 20), (22, 11)] * 64, 1, NAFLEX),
]
CPU_CASES = [
    ("Qwen3-VL", 48, 1152, [(16, 22), (22, 16), (16, 16)], 2, QWEN),
    ("DINOv2-L", 37, 1024, [(16, 16)], 1, {"mode": "bicubic"}),
    ("SigLIP2-NaFlex", 16, 768, [(16, 16), (12, 20), (22, 11)], 1, NAFLEX),
]
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield every kind of weights, both dtypes and merge blocks."""
    grids = [(32, 44), (44, 32), (64, 64)] * 8
    yield "Qwen3-VL 1152 bfloat16", lambda: _launch(48, 1152, grids, 2, 2, "bilinear", True, torch.bfloat16)
    yield "DINOv2-L 1024 bfloat16", lambda: _launch(37, 1024, grids, 1, 4, "bicubic", False, torch.bfloat16)
    yield "DINOv2-L 1024 float32", lambda: _launch(37, 1024, grids, 1, 4, "bicubic", False, torch.float32)
    yield "SigLIP2-NaFlex 768 bfloat16", lambda: _launch(16, 768, grids, 1, 5, "antialias", False, torch.bfloat16)


def _launch(
    side: int, d: int, grids: list[tuple[int, int]], merge: int, taps: int, mode: str, align: bool, dtype: torch.dtype
) -> None:
    rows, table = sum(h * w for h, w in grids), torch.empty(side, side, d, dtype=dtype, device="meta")
    packed = grid_table(grids, 0, torch.device("meta"))
    position_resample_triton(table, packed, rows, merge, taps, mode, align)
    grad = torch.empty(rows, d, dtype=dtype, device="meta")
    position_resample_bwd_triton(grad, packed, side, side, merge, taps, mode, align)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(CASES if CUDA else CPU_CASES)))
def bench_position_resample(compare, case, dtype, mode):
    name, side, d, grids, merge, options = (CASES if CUDA else CPU_CASES)[case]
    torch.manual_seed(0)
    table = torch.randn(side, side, d, device="cuda" if CUDA else "cpu").to(dtype).requires_grad_()
    rows = sum(h * w for h, w in grids)
    sampled = {"align_corners": False, "antialias": False, **options}

    def ours(table):
        return position_resample(table, grids, merge_size=merge, **options)

    def interpolate(table: Tensor) -> Tensor:
        wide = table.to(torch.promote_types(table.dtype, torch.float32)).permute(2, 0, 1)[None]
        out = []
        for h, w in grids:
            y = F.interpolate(wide, (h, w), **sampled)[0]
            y = y.view(d, h // merge, merge, w // merge, merge).permute(1, 3, 2, 4, 0)
            out.append(y.reshape(h * w, d).to(table.dtype))
        return torch.cat(out)

    providers = {"fastmllm": ours, "interpolate": interpolate, "torch.compile": torch.compile(interpolate)}
    if not sampled["antialias"]:
        taps, weights = _taps(side, grids, merge, sampled["mode"], sampled["align_corners"], table.device)

        def gathered(table: Tensor) -> Tensor:  # taps and weights made beforehand
            rows = F.embedding(taps, table.flatten(0, 1)) * weights.to(torch.promote_types(table.dtype, torch.float32))
            return rows.sum(1).to(table.dtype)

        providers["gathered taps"] = gathered
    traffic = table.nbytes + rows * d * dtype.itemsize
    compare(
        op="position_resample",
        case=f"{name} {side}x{side} to {rows} patches {d} {str(dtype)[6:]}",
        mode=mode,
        providers=providers,
        inputs=[table],
        oracle=interpolate,
        bytes=traffic * (2 if mode == "full" else 1),
    )


def _taps(
    side: int, grids: list[tuple[int, int]], merge: int, mode: str, align: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the entries (M, taps) that each patch reads and their weights (M, taps, 1)."""
    found = []
    for h, w in grids:
        axes = []
        for n in (h, w):
            place = torch.arange(n, dtype=torch.float64)
            source = place * (side - 1) / max(n - 1, 1) if align else (place + 0.5) * side / n - 0.5
            offsets = torch.arange(2) if mode == "bilinear" else torch.arange(-1, 3)
            x = (source - source.floor())[:, None] - offsets
            x = x.abs()
            near, far = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
            weights = 1 - x if mode == "bilinear" else torch.where(x <= 1, near, far)
            axes.append(((source.floor().long()[:, None] + offsets).clamp(0, side - 1), weights))
        (i, a), (j, b) = axes
        taps = (i[:, None, :, None] * side + j[None, :, None, :]).flatten(2)  # (h, w, taps)
        weights = (a[:, None, :, None] * b[None, :, None, :]).flatten(2)
        order = torch.arange(h * w).view(h // merge, merge, w // merge, merge).transpose(1, 2).flatten()
        found.append((taps.flatten(0, 1)[order], weights.flatten(0, 1)[order]))
    taps, weights = (torch.cat(t).to(device) for t in zip(*found, strict=True))
    return taps, weights.unsqueeze(-1)
