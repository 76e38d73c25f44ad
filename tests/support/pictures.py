"""Pictures and sizes for the resolution tests."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return noise over a gradient: a shift by one pixel or another filter shows everywhere."""
    values = np.random.default_rng(seed).integers(0, 120, (height, width, 3))
    values += np.linspace(0, 120, width).astype(np.int64)[None, :, None]
    values[..., 1] += np.arange(height)[:, None] % 16
    return Image.fromarray(values.astype(np.uint8))


def image_sizes(count: int, most: int, seed: int = 0, ratio: float = 60.0) -> list[tuple[int, int]]:
    """Return random (width, height): any, squares, and whole ratios, which is where ties are."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        width, height = draw.randint(1, most), draw.randint(1, most)
        kind = draw.randrange(4)
        if kind == 0:
            height = width
        elif kind == 1:
            a, b, scale = draw.randint(1, 12), draw.randint(1, 12), draw.randint(1, max(most // 12, 1))
            width, height = a * scale, b * scale
        if max(width, height) <= ratio * min(width, height):
            found.append((width, height))
    return found
