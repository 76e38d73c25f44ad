"""Patch embedding over the fused op: rescale, normalise, cut, project and add positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmllm.kernels.patch_embed import flatten_images, patch_embed, patch_embed_packed, patch_weight
from fastmllm.kernels.position_resample import position_resample


class PatchEmbed(nn.Module):
    """Embed an image's patches.

    Args:
        patch_size: pixels of a patch on a side (P).
        width: D.
        channels: C of the image.
        bias: whether the projection has a bias.
        grid: side of the square position table in patches, or None for no positions.
        mean, std: per channel, in 0..1 units; None leaves pixels at 0..1.
        temporal_patch_size: frames of a patch (T). A still image is T equal frames: the weight is folded for it.
        mode, align_corners, antialias: how positions are resampled (`position_resample`): the defaults are DINOv2's.

    The weight is stored (K, D) with K in (frame, row, column, channel) order; `load_conv_weight` takes a convolution's.
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
        temporal_patch_size: int = 1,
        mode: str = "bicubic",
        align_corners: bool = False,
        antialias: bool = False,
    ) -> None:
        super().__init__()
        if min(patch_size, width, channels, temporal_patch_size) < 1 or (grid is not None and grid < 1):
            raise ValueError(
                f"PatchEmbed: sizes must be >= 1, got {patch_size=}, {width=}, {channels=}, {grid=}, "
                f"{temporal_patch_size=}"
            )
        if (mean is None) != (std is None) or (mean is not None and not len(mean) == len(std or ()) == channels):
            raise ValueError(f"PatchEmbed: mean and std need {channels} values each, got {mean} and {std}")
        self.patch_size, self.grid = patch_size, grid
        self.mean, self.std, self.temporal_patch_size = mean, std, temporal_patch_size
        self.mode, self.align_corners, self.antialias = mode, align_corners, antialias
        self.weight = nn.Parameter(torch.empty(temporal_patch_size * patch_size * patch_size * channels, width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.position = nn.Parameter(torch.empty(grid * grid, width)) if grid else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight at variance 1/K and positions at 0.02."""
        nn.init.trunc_normal_(self.weight, std=self.weight.shape[0] ** -0.5)
        if self.position is not None:
            nn.init.trunc_normal_(self.position, std=0.02)

    def _still_weight(self) -> Tensor:
        if self.temporal_patch_size == 1:
            return self.weight
        return self.weight.unflatten(0, (self.temporal_patch_size, -1)).sum(0)

    def _position(self, grids: Sequence[Sequence[int]], merge_size: int = 1) -> Tensor | None:
        if self.position is None or self.grid is None:
            return None
        if list(grids) == [(self.grid, self.grid)] and merge_size == 1:
            return self.position
        table = self.position.unflatten(0, (self.grid, self.grid))
        return position_resample(
            table, grids, mode=self.mode, align_corners=self.align_corners, antialias=self.antialias,
            merge_size=merge_size,
        )  # fmt: skip

    def forward(self, pixels: Tensor, layout: str = "hwc", prefix: Tensor | None = None) -> Tensor:
        """Embed images of one size.

        Args:
            pixels: (I, H, W, C) uint8, or float in 0..1; H and W multiples of the patch size. (I, C, H, W) in layout
                "chw".
            layout: "hwc" or "chw".
            prefix: (R, D) rows put before each image (a class token with its position), or None.

        Returns:
            (I, R + N, D), N = (H / P) * (W / P), row-major.

        Raises:
            ValueError: shape or dtype do not fit.
        """
        height, width = pixels.shape[-2:] if layout == "chw" else pixels.shape[1:3]
        if pixels.dim() != 4 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"PatchEmbed: pixels must be (I, H, W, C) with H and W multiples of {self.patch_size}, got "
                f"{tuple(pixels.shape)} in layout {layout!r}; resize or pad the image"
            )
        position = self._position([(height // self.patch_size, width // self.patch_size)])
        return patch_embed(
            pixels, self._still_weight(), self.bias, position, mean=self.mean, std=self.std, patch_size=self.patch_size,
            layout=layout, prefix=prefix,
        )  # fmt: skip

    def forward_packed(
        self,
        pixels: Tensor | Sequence[Tensor],
        grid_thw: Sequence[Sequence[int]] | None = None,
        layout: str = "hwc",
        merge_size: int = 1,
        still: bool = False,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed images and videos of different sizes.

        Args:
            pixels: a list of images (H, W, C) and videos (F, H, W, C), or a flat buffer of them with their grids; or
                (M, K) patches in the order of the weight's rows, already normalised, with their grids.
            grid_thw: (t, h, w) or (h, w) patches of each image that is not in a list.
            layout: "hwc" or "chw", of each image.
            merge_size: patches come in blocks of merge_size x merge_size; 1 is row-major.
            still: all are single frames that stand for `temporal_patch_size` equal ones.
            prefix: (R, D) rows put before each frame, or None.

        Returns:
            (M + S * R, D) and cu_seqlens (S + 1,) int32, a segment a frame.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        frames = 1 if still else self.temporal_patch_size
        if not isinstance(pixels, Tensor):
            pixels, grid_thw = flatten_images(pixels, self.patch_size, frames, layout, self.weight.device)
        if grid_thw is None or pixels.dim() not in (1, 2):
            raise ValueError(
                f"PatchEmbed: pixels {tuple(pixels.shape)} must be a list of images, or flat or (M, K) with their "
                "grid_thw"
            )
        mean, std = (None, None) if pixels.dim() == 2 else (self.mean, self.std)
        return patch_embed_packed(
            pixels, self._still_weight() if still else self.weight, self.bias, self._position(grid_thw, merge_size),
            grid_thw=grid_thw, mean=mean, std=std, patch_size=self.patch_size, temporal_patch_size=frames,
            merge_size=merge_size, layout=layout, prefix=prefix,
        )  # fmt: skip

    @torch.no_grad()
    def load_conv_weight(self, weight: Tensor) -> None:
        """Take the weight (D, C, P, P) or (D, C, T, P, P) of the convolution that this layer replaces."""
        self.weight.copy_(conv_to_patch_weight(weight))

    def conv_weight(self) -> Tensor:
        """Return the weight as a convolution's, (D, C, P, P), or (D, C, T, P, P) where T > 1."""
        return patch_to_conv_weight(self.weight, self.patch_size, self.temporal_patch_size)


def conv_to_patch_weight(weight: Tensor) -> Tensor:
    """Reorder a convolution's (D, C, P, P) or (D, C, T, P, P) into (K, D), as `patch_embed` takes it."""
    return patch_weight(weight).contiguous()


def patch_to_conv_weight(weight: Tensor, patch_size: int, temporal_patch_size: int = 1) -> Tensor:
    """Reorder a patch weight (K, D) into a convolution's (D, C, P, P), or (D, C, T, P, P) where T > 1."""
    shape = (temporal_patch_size, patch_size, patch_size, -1, weight.shape[1])
    conv = weight.reshape(shape).permute(4, 3, 0, 1, 2)
    return (conv if temporal_patch_size > 1 else conv.squeeze(2)).contiguous()
