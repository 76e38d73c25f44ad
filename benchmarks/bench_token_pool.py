"""token_pool against F.interpolate and F.adaptive_avg_pool2d: LLaVA video, packed images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from fastmllm.kernels.token_pool import token_pool, token_pool_bwd_triton, token_pool_triton

CUDA = torch.cuda.is_available()
FRAMES = 32 if CUDA else 1
PACKED = [(24, 40), (36, 28), (20, 48), (32, 32), (16, 60), (44, 24)]
# grids (t, h, w), targets, D, mode: SigLIP-so400m video, CLIP-L/336 video, the same tokens projected, packed images
CASES = {
    "LLaVA-OneVision": ([(FRAMES, 27, 27)], [(14, 14)], 1152, "bilinear"),
    "LLaVA-NeXT-Video": ([(FRAMES, 24, 24)], [(12, 12)], 1024, "average"),
    "LLaVA-OneVision projected": ([(FRAMES, 27, 27)], [(14, 14)], 3584, "bilinear"),
    "packed": (
        [(1, *g) for g in PACKED] * (4 if CUDA else 1),
        [(12, 12), (9, 14)] * (12 if CUDA else 3),
        1152,
        "average",
    ),
}
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield both poolings of one grid and of many, in bf16 and fp32."""
    for bilinear in (False, True):
        for ragged in (False, True):
            for dtype in (torch.bfloat16, torch.float32):
                name = f"{'bilinear' if bilinear else 'average'}{' ragged' if ragged else ''} {str(dtype)[6:]}"
                yield name, lambda b=bilinear, r=ragged, d=dtype: _launch(b, r, d)


def _launch(bilinear: bool, ragged: bool, dtype: torch.dtype) -> None:
    runs = [32, 27, 27, 14, 14] + ([1, 24, 40, 12, 12, 3, 16, 60, 9, 14] if ragged else [])
    parts = [runs[i : i + 5] for i in range(0, len(runs), 5)]
    tokens, pooled = (sum(p[0] * p[i] * p[i + 1] for p in parts) for i in (1, 3))
    token_pool_triton(torch.empty(tokens, 1152, dtype=dtype, device="meta"), runs, bilinear, 0)
    token_pool_bwd_triton(torch.empty(pooled, 1152, dtype=dtype, device="meta"), runs, bilinear, 0)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"] if CUDA else ["forward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES if CUDA else ("LLaVA-OneVision", "LLaVA-NeXT-Video", "packed"))
def bench_token_pool(compare, case, dtype, mode):
    grid, sizes, width, pooling = CASES[case]
    torch.manual_seed(0)
    tokens = sum(t * h * w for t, h, w in grid)
    pooled = sum(t * h * w for (t, _, _), (h, w) in zip(grid, sizes, strict=True))
    x = torch.randn(tokens, width, device="cuda" if CUDA else "cpu", dtype=dtype).requires_grad_()

    def ours(x):
        return token_pool(x, grid, size=sizes, mode=pooling)

    def eager(x):
        """Do what LLaVA-OneVision's code does, one group of equal images after another."""
        parts, start = [], 0
        for (t, h, w), size in zip(grid, sizes, strict=True):
            tiles = x[start : start + t * h * w].view(t, h, w, width).permute(0, 3, 1, 2).contiguous()
            tiles = (
                F.interpolate(tiles, size, mode="bilinear")
                if pooling == "bilinear"
                else F.adaptive_avg_pool2d(tiles, size)
            )
            parts.append(tiles.permute(0, 2, 3, 1).reshape(-1, width))
            start += t * h * w
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def channels_last(x):
        """Do it without the copy: what a careful user writes."""
        parts, start = [], 0
        for (t, h, w), size in zip(grid, sizes, strict=True):
            tiles = x[start : start + t * h * w].view(t, h, w, width).permute(0, 3, 1, 2)
            tiles = (
                F.interpolate(tiles, size, mode="bilinear")
                if pooling == "bilinear"
                else F.adaptive_avg_pool2d(tiles, size)
            )
            parts.append(tiles.permute(0, 2, 3, 1).reshape(-1, width))
            start += t * h * w
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    one_way = (tokens + pooled) * width * x.element_size()
    compare(
        op="token_pool",
        case=f"{case} D{width} {pooling} {str(dtype)[6:]}",
        mode=mode,
        providers={
            "fastmllm": ours,
            "torch": eager,
            "torch channels last": channels_last,
            "torch.compile": torch.compile(eager),
        },
        inputs=[x],
        oracle=eager,
        bytes=one_way * (2 if mode == "full" else 1),
    )
