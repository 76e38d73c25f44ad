"""Depthwise convolution over packed token grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DepthwiseConv(nn.Module):
    """Convolve each channel of each image's grid, with zeros around; the weight is that of a grouped nn.Conv2d.

    Args:
        width: D.
        kernel_size: odd.
        bias: whether there is one.
    """

    def __init__(self, width: int, kernel_size: int = 3, bias: bool = True) -> None:
        super().__init__()
        if width < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"DepthwiseConv: {width=} must be positive, {kernel_size=} odd")
        self.weight = nn.Parameter(torch.empty(width, 1, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        nn.init.uniform_(self.weight, -1 / kernel_size, 1 / kernel_size)  # nn.Conv2d's bound

    def forward(self, x: Tensor, runs: Sequence[tuple[int, int, int]]) -> Tensor:
        """Convolve packed tokens.

        Args:
            x: (M, D), images one after another, row-major.
            runs: (images, h, w), neighbours of one size together; host.

        Returns:
            (M, D).
        """
        width, pad = x.shape[1], self.weight.shape[-1] // 2
        done = []
        for part, (images, h, w) in zip(x.split([n * h * w for n, h, w in runs]), runs, strict=True):
            pixels = part.view(images, h, w, width).permute(0, 3, 1, 2)  # channels last
            y = F.conv2d(pixels, self.weight, self.bias, padding=pad, groups=width)
            done.append(y.permute(0, 2, 3, 1).reshape(-1, width))
        return torch.cat(done) if done else x
