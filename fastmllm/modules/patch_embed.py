"""Patch embedding over the fused op: rescale, normalise, cut, project and add positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.kernels.patch_embed import patch_embed


class PatchEmbed(nn.Module):
    """Embed an image's patches.

    Args:
        patch_size: pixels of a patch on a side (P).
        width: D.
        channels: C of the image.
        bias: whether the projection has a bias.
        grid: side of the square position table in patches, or None for no positions.
        mean, std: per channel, in 0..1 units; None leaves pixels at 0..1.

    The weight is stored (K, D) with K in (row, column, channel) order; `load_conv_weight` takes a convolution's.
    """

    def __init__(
        self,
        patch_size: int,
        width: int,
        channels: int = 3,
        bias: bool = True,
        grid: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 1 or width < 1 or channels < 1 or (grid is not None and grid < 1):
            raise ValueError(f"PatchEmbed: sizes must be >= 1, got {patch_size=}, {width=}, {channels=}, {grid=}")
        if (mean is None) != (std is None) or (mean is not None and not len(mean) == len(std or ()) == channels):
            raise ValueError(f"PatchEmbed: mean and std need {channels} values each, got {mean} and {std}")
        self.patch_size, self.grid = patch_size, grid
        self.mean, self.std = mean, std
        self.weight = nn.Parameter(torch.empty(channels * patch_size * patch_size, width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.position = nn.Parameter(torch.empty(grid * grid, width)) if grid else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight at variance 1/K and positions at 0.02."""
        nn.init.trunc_normal_(self.weight, std=self.weight.shape[0] ** -0.5)
        if self.position is not None:
            nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed images of one size.

        Args:
            pixels: (I, H, W, C) uint8, or float in 0..1; H and W multiples of the patch size.

        Returns:
            (I, N, D), N = (H / P) * (W / P), row-major.

        Raises:
            ValueError: shape or dtype do not fit.
        """
        if pixels.dim() != 4 or pixels.shape[1] % self.patch_size or pixels.shape[2] % self.patch_size:
            raise ValueError(
                f"PatchEmbed: pixels must be (I, H, W, C) with H and W multiples of {self.patch_size}, got "
                f"{tuple(pixels.shape)}; resize or pad the image"
            )
        rows, columns = pixels.shape[1] // self.patch_size, pixels.shape[2] // self.patch_size
        position = None
        if self.position is not None and self.grid is not None:
            position = resample_position(self.position, self.grid, rows, columns)
        return patch_embed(
            pixels, self.weight, self.bias, position, mean=self.mean, std=self.std, patch_size=self.patch_size
        )

    @torch.no_grad()
    def load_conv_weight(self, weight: Tensor) -> None:
        """Take the weight (D, C, P, P) of the convolution that this layer replaces."""
        self.weight.copy_(conv_to_patch_weight(weight))

    def conv_weight(self) -> Tensor:
        """Return the weight as a convolution's, (D, C, P, P)."""
        return patch_to_conv_weight(self.weight, self.patch_size)


def conv_to_patch_weight(weight: Tensor) -> Tensor:
    """Reorder a convolution's (D, C, P, P) into (K, D), K in (row, column, channel) order."""
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]).contiguous()


def patch_to_conv_weight(weight: Tensor, patch_size: int) -> Tensor:
    """Reorder a patch weight (K, D) into a convolution's (D, C, P, P)."""
    return weight.reshape(patch_size, patch_size, -1, weight.shape[1]).permute(3, 2, 0, 1).contiguous()


def resample_position(position: Tensor, grid: int, rows: int, columns: int) -> Tensor:
    """Resample a square position table bicubically, in fp32.

    Args:
        position: (grid * grid, D).
        grid: its side.
        rows, columns: the wanted grid.

    Returns:
        (rows * columns, D) in the dtype of `position`; the table itself where the sizes agree.

    Equal to transformers' Dinov2Embeddings.interpolate_pos_encoding (no antialiasing, corners not aligned).
    """
    if (rows, columns) == (grid, grid):
        return position
    table = position.float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)  # (1, D, grid, grid)
    table = F.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).reshape(rows * columns, -1).to(position.dtype)
