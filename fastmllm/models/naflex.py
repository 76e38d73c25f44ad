"""SigLIP2's native aspect ratio (NaFlex, arXiv 2502.14786): which grid of patches an image becomes.

The encoder is `VisionTransformer` with `resample="antialias"`: `forward_packed` takes images of any grids, without
padding, their positions resampled for each.
"""

from __future__ import annotations

import math


def naflex_grid(height: int, width: int, patch_size: int = 16, max_patches: int = 256) -> tuple[int, int]:
    """Choose the largest grid of at most `max_patches` patches that keeps the aspect ratio up to rounding.

    Args:
        height, width: of the image, pixels.
        patch_size: P, pixels.
        max_patches: of the whole image.

    Returns:
        (h, w) in patches; the image is stretched to (h * P, w * P) pixels, up or down.

    Raises:
        ValueError: a size is not positive.

    Equal to Siglip2ImageProcessor's choice: bisection of the scale between 1e-6 and 100 down to 1e-5, both sides
    rounded up to patches.
    """
    if min(height, width, patch_size, max_patches) < 1:
        raise ValueError(f"naflex_grid: sizes must be >= 1, got {height=}, {width=}, {patch_size=}, {max_patches=}")

    def grid(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch_size)), max(1, math.ceil(width * scale / patch_size))

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        h, w = grid(scale)
        low, high = (scale, high) if h * w <= max_patches else (low, scale)
    return grid(low)
