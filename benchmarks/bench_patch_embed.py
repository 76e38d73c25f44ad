"""patch_embed against what vision transformers do: normalise, then a convolution, or a linear layer on cut patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.kernels.patch_embed import patch_embed, patch_embed_bwd_triton, patch_embed_triton

CUDA = torch.cuda.is_available()
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# images, pixels a side, patch, width: CLIP ViT-L/14 336, SigLIP-SO400M/14 (378 here: 27 patches), ViT-B/16, DINOv2-S/14
CASES = [(32, 336, 14, 1024), (32, 378, 14, 1152), (64, 224, 16, 768), (64, 224, 14, 384), (1, 336, 14, 1024)]
CPU_CASES = [(1, 336, 14, 1024), (1, 224, 16, 768), (4, 224, 14, 384), (1, 56, 14, 64)]
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield both alignments of a patch row, both kinds of pixels, both tile sizes and the fp32 path."""
    for images, side, patch, width in ((32, 336, 14, 1024), (64, 224, 16, 768)):
        for pixels in (torch.uint8, torch.bfloat16):
            shape = (images, side, patch, width)
            yield f"{images}x{side}/{patch} {width} {str(pixels)[6:]}", lambda s=shape, p=pixels: _launch(s, p)
    yield "1x336/14 1024 uint8", lambda: _launch((1, 336, 14, 1024), torch.uint8)
    yield "1x336/14 1024 uint8 fp32", lambda: _launch((1, 336, 14, 1024), torch.uint8, torch.float32)


def _launch(shape: tuple[int, int, int, int], pixels: torch.dtype, dtype: torch.dtype = torch.bfloat16) -> None:
    images, side, patch, width = shape
    n = (side // patch) ** 2
    x = torch.empty(images, side, side, 3, dtype=pixels, device="meta")
    w, p, grad = (
        torch.empty(s, dtype=dtype, device="meta") for s in ((patch * patch * 3, width), (n, width), (images, n, width))
    )
    affine = ([0.015, 0.014, 0.013], [-1.9, -1.8, -1.4]) if pixels == torch.uint8 else ([1.0] * 3, [0.0] * 3)
    patch_embed_triton(x, w, w[0], p, patch, *affine)
    patch_embed_bwd_triton(grad, x, w, patch, pixels != torch.uint8, True, *affine)


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
