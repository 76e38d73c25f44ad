"""Images and weights for the tests of patch_embed."""

from __future__ import annotations

import torch

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SCALE, SHIFT = [0.015, 0.014, 0.013], [-1.9, -1.8, -1.4]
# frames of patches a grid has, T, merge, planar, P, D; grids cross the tiles of a kernel and one is empty
PACKED = [
    ([(1, 2, 4), (1, 4, 2), (0, 2, 2), (2, 2, 2)], 2, 2, False, 2, 5),
    ([(3, 5), (0, 4), (1, 1)], 1, 1, True, 3, 33),
    ([(1, 3, 2), (2, 1, 2)], 2, 1, True, 2, 16),
    ([(9, 8), (1, 1)], 1, 1, False, 2, 7),
    ([], 1, 1, False, 2, 7),
]


def inputs(shape, dtype, uint8, device="cpu", channels=3):
    torch.manual_seed(0)
    images, height, width, patch, dim = shape
    pixels = torch.randint(0, 256, (images, height, width, channels), dtype=torch.uint8)
    k, n = patch * patch * channels, (height // patch) * (width // patch)
    weight, bias, position = torch.randn(k, dim) / k**0.5, torch.randn(dim), torch.randn(n, dim)
    pixels = pixels if uint8 else (pixels / 255).to(dtype)
    return [pixels.to(device), *(t.to(device, dtype) for t in (weight, bias, position))]


def packed_inputs(case, dtype, uint8, device="cpu", prefix_rows=0):
    torch.manual_seed(0)
    grids, frames, _, _, patch, dim = case
    sizes = [(g[-2], g[-1]) for g in grids for _ in range(g[0] if len(g) == 3 else 1)]
    m, k = sum(h * w for h, w in sizes), frames * patch * patch * 3
    pixels = torch.randint(0, 256, (m * k,), dtype=torch.uint8)
    tensors = [torch.randn(k, dim) / k**0.5, torch.randn(dim), torch.randn(m, dim)]
    tensors = [t.to(device, dtype) for t in tensors]
    prefix = torch.randn(prefix_rows, dim).to(device, dtype) if prefix_rows else None
    return [(pixels if uint8 else (pixels / 255).to(dtype)).to(device), *tensors, prefix]
