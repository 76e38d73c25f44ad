"""Pixel shuffle: each block of neighbouring visual tokens becomes one wide token, with one copy in place of two."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

from torch import Tensor

from fastmllm.hf.fusion import Fusion
from fastmllm.kernels.pixel_shuffle import pixel_shuffle


class PixelShuffle(Fusion):
    """`pixel_shuffle(x, scale_factor)` of connectors: (I, N, D) tokens of square images, in and out row by row."""

    op = "pixel_shuffle"
    overrides = ("pixel_shuffle",)

    @staticmethod
    def unsupported(module: Any, x: Tensor, scale_factor: int = 2, *args: Any, **kwargs: Any) -> str | None:
        side = isqrt(x.shape[1])
        if side * side != x.shape[1] or side % scale_factor:
            return f"{x.shape[1]} tokens are no square of whole blocks of {scale_factor}"
        return None

    @staticmethod
    def pixel_shuffle(module: Any, original: Callable[..., Tensor], x: Tensor, scale_factor: int = 2) -> Tensor:
        return pixel_shuffle(x, factor=scale_factor)


class GridPixelShuffle(Fusion):
    """InternVL's: `pixel_shuffle(x, scale_factor)` of (I, W, H, D) with a factor below 1."""

    op = "pixel_shuffle"
    overrides = ("pixel_shuffle",)

    @staticmethod
    def unsupported(
        module: Any, vision_features: Tensor, scale_factor: float = 0.5, *args: Any, **kwargs: Any
    ) -> str | None:
        factor = round(1 / scale_factor)
        if factor * scale_factor != 1 or any(n % factor for n in vision_features.shape[1:3]):
            return f"{tuple(vision_features.shape[1:3])} tokens are not scaled by {scale_factor} in whole blocks"
        return None

    @staticmethod
    def pixel_shuffle(
        module: Any, original: Callable[..., Tensor], vision_features: Tensor, scale_factor: float = 0.5
    ) -> Tensor:
        images, width, height, _ = vision_features.shape
        factor = round(1 / scale_factor)
        y = pixel_shuffle(vision_features.flatten(1, 2), [(width, height)], factor)
        return y.view(images, width // factor, height // factor, -1)
