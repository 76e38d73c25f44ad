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
