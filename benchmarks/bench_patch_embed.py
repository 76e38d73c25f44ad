"""patch_embed against what vision transformers do: normalise, then a convolution, or a linear layer on cut patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.kernels._grids import grid_table
from fastmllm.kernels.patch_embed import (
    patch_embed,
    patch_embed_bwd_triton,
    patch_embed_packed,
    patch_embed_triton,
)

CUDA = torch.cuda.is_available()
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# images, pixels a side, patch, width: CLIP ViT-L/14 336, SigLIP-SO400M/14 (378 here: 27 patches), ViT-B/16, DINOv2-S/14
CASES = [(32, 336, 14, 1024), (32, 378, 14, 1152), (64, 224, 16, 768), (64, 224, 14, 384), (1, 336, 14, 1024)]
CPU_CASES = [(1, 336, 14, 1024), (1, 224, 16, 768), (4, 224, 14, 384), (1, 56, 14, 64)]
# grids of packed images, patch, width: Qwen2.5-VL (photographs of some 700 x 500), Qwen3-VL, SigLIP2-NaFlex
PACKED = [
    ([(1, 36, 52), (1, 52, 36), (1, 46, 46)] * 8, 14, 1280),
    ([(1, 32, 44), (1, 44, 32), (1, 64, 64)] * 8, 16, 1152),
    ([(16, 16), (12, 20), (22, 11)] * 64, 16, 768),
]
CPU_PACKED = [([(1, 16, 16), (1, 12, 20), (1, 8, 26)], 14, 1280), ([(4, 4), (2, 6), (6, 2)] * 4, 16, 96)]
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield both alignments of a patch row, both kinds and layouts of pixels, packed images, tile sizes, fp32."""
    for images, side, patch, width in ((32, 336, 14, 1024), (64, 224, 16, 768)):
        for pixels in (torch.uint8, torch.bfloat16):
            shape = (images, side, patch, width)
            yield f"{images}x{side}/{patch} {width} {str(pixels)[6:]}", lambda s=shape, p=pixels: _launch(s, p)
    yield "32x336/14 1024 uint8 chw", lambda: _launch((32, 336, 14, 1024), torch.uint8, planar=True)
    yield "1x336/14 1024 uint8", lambda: _launch((1, 336, 14, 1024), torch.uint8)
    yield "1x336/14 1024 uint8 fp32", lambda: _launch((1, 336, 14, 1024), torch.uint8, torch.float32)
    yield "1x336/14 1024 uint8 fp32 class token", lambda: _launch((1, 336, 14, 1024), torch.uint8, torch.float32, r=1)
    yield "32x336/14 1024 bfloat16 class token", lambda: _launch((32, 336, 14, 1024), torch.bfloat16, r=1)
    grids = [(36, 52), (52, 36), (46, 46)] * 8
    yield "packed /14 1280 uint8", lambda: _launch_packed(grids, 14, 1280, torch.uint8, 1, False)
    yield "packed /16 1152 bfloat16 chw video", lambda: _launch_packed(grids, 16, 1152, torch.bfloat16, 2, True)


def _launch(
    shape: tuple[int, int, int, int],
    pixels: torch.dtype,
    dtype: torch.dtype = torch.bfloat16,
    planar: bool = False,
    r: int = 0,
) -> None:
    images, side, patch, width = shape
    n = (side // patch) ** 2
    size = (images, 3, side, side) if planar else (images, side, side, 3)
    x = torch.empty(size, dtype=pixels, device="meta")
    sizes = ((patch * patch * 3, width), (n, width), (images, r + n, width), (r, width))
    w, p, grad, prefix = (torch.empty(s, dtype=dtype, device="meta") for s in sizes)
    affine = ([0.015, 0.014, 0.013], [-1.9, -1.8, -1.4]) if pixels == torch.uint8 else ([1.0] * 3, [0.0] * 3)
    patch_embed_triton(x, w, w[0], p, prefix if r else None, None, patch, 1, 1, planar, *affine)
    patch_embed_bwd_triton(grad, x, w, patch, pixels != torch.uint8, True, None, r, 1, 1, planar, *affine)


def _launch_packed(
    grids: list[tuple[int, int]], patch: int, width: int, pixels: torch.dtype, frames: int, planar: bool
) -> None:
    m, k = sum(h * w for h, w in grids), frames * patch * patch * 3
    x = torch.empty(m * k, dtype=pixels, device="meta")
    w, p, prefix = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((k, width), (m, width), (1, width)))
    table = grid_table(grids, 1, torch.device("meta"))
    grad = torch.empty(m + len(grids), width, dtype=torch.bfloat16, device="meta")
    affine = ([0.015, 0.014, 0.013], [-1.9, -1.8, -1.4]) if pixels == torch.uint8 else ([1.0] * 3, [0.0] * 3)
    last = (frames, 2, planar, *affine)
    patch_embed_triton(x, w, w[0], p, prefix, table, patch, *last)
    patch_embed_bwd_triton(grad, x, w, patch, pixels != torch.uint8, True, table, 1, *last)


def _normalised(w: Tensor, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(t, device=w.device) for t in (MEAN, STD))
    return ((pixels.to(torch.promote_types(w.dtype, torch.float32)) / 255 - mean) / std).to(w.dtype)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images, side, patch, width", CASES if CUDA else CPU_CASES)
def bench_patch_embed(compare, images, side, patch, width, dtype, mode):
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    grid, k = side // patch, patch * patch * 3
    pixels = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, device=device)
    leaves = [torch.randn(k, width) / k**0.5, torch.randn(width), torch.randn(grid * grid, width)]
    leaves = [t.to(device, dtype).requires_grad_() for t in leaves]

    def ours(w, b, p, pixels):
        return patch_embed(pixels, w, b, p, mean=MEAN, std=STD, patch_size=patch)

    def convolution(w, b, p, pixels):
        kernel = w.view(patch, patch, 3, width).permute(3, 2, 0, 1)
        out = F.conv2d(_normalised(w, pixels).permute(0, 3, 1, 2), kernel, b, stride=patch)
        return out.flatten(2).transpose(1, 2) + p

    def linear(w, b, p, pixels):
        rows = _normalised(w, pixels).view(images, grid, patch, grid, patch * 3).transpose(2, 3)
        return F.linear(rows.reshape(images, grid * grid, k), w.t(), b) + p

    output = images * grid * grid * width * dtype.itemsize
    forward = pixels.numel() + output + leaves[0].nbytes + leaves[2].nbytes
    flops = 2 * images * grid * grid * k * width
    compare(
        op="patch_embed",
        case=f"{images}x{side}/{patch} {width} {str(dtype)[6:]}",
        mode=mode,
        providers={"fastmllm": ours, "conv2d": convolution, "linear": linear, "torch.compile": torch.compile(linear)},
        inputs=[*leaves, pixels],
        oracle=linear,
        bytes={"forward": forward, "backward": forward, "full": 2 * forward}[mode],
        flops=flops * (2 if mode == "full" else 1),
    )


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(PACKED if CUDA else CPU_PACKED)))
def bench_patch_embed_packed(compare, case, dtype, mode):
    """Against an image processor that normalises and cuts each image, repeats a still over two frames, and a linear."""
    grids, patch, width = (PACKED if CUDA else CPU_PACKED)[case]
    device, still = "cuda" if CUDA else "cpu", len(grids[0]) == 3
    frames, merge = (2, 2) if still else (1, 1)
    torch.manual_seed(0)
    sizes = [g[-2:] for g in grids]
    m, run = sum(h * w for h, w in sizes), patch * patch * 3
    pixels = torch.randint(0, 256, (m * run,), dtype=torch.uint8, device=device)
    leaves = [torch.randn(frames * run, width) / run**0.5, torch.randn(width), torch.randn(m, width)]
    leaves = [t.to(device, dtype).requires_grad_() for t in leaves]

    def ours(w, b, p, pixels):
        folded = w.view(frames, run, width).sum(0) if still else w
        return patch_embed_packed(pixels, folded, b, p, grid_thw=grids, mean=MEAN, std=STD, patch_size=patch,
                                  merge_size=merge)[0]  # fmt: skip

    def linear(w, b, p, pixels):
        rows = []
        for x, (gh, gw) in zip(pixels.split([h * w * run for h, w in sizes]), sizes, strict=True):
            cut = _normalised(w, x.view(gh * patch, gw * patch, 3))
            cut = cut.view(gh // merge, merge, patch, gw // merge, merge, patch, 3).permute(0, 3, 1, 4, 2, 5, 6)
            rows.append(cut.reshape(gh * gw, 1, run).expand(-1, frames, -1).reshape(gh * gw, frames * run))
        return F.linear(torch.cat(rows), w.t(), b) + p

    output = m * width * dtype.itemsize
    forward = pixels.numel() + 2 * output + leaves[0].nbytes
    flops = 2 * m * run * width
    compare(
        op="patch_embed",
        case=f"packed {len(grids)} images, {m} patches /{patch} {width} {str(dtype)[6:]}",
        mode=mode,
        providers={"fastmllm": ours, "linear": linear, "torch.compile": torch.compile(linear)},
        inputs=[*leaves, pixels],
        oracle=linear,
        bytes={"forward": forward, "backward": forward, "full": 2 * forward}[mode],
        flops=flops * (2 if mode == "full" else 1),
    )
