"""Fingerprints of images: equal pixels, and pictures that look the same after scaling or recompression."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

BITS = 64
_SIDE, _KEPT, _GRID = 32, 8, 4
_k = np.arange(_SIDE)
_DCT = np.cos(np.pi / _SIDE * (_k[None, :] + 0.5) * _k[:_KEPT, None])  # (8, 32)


@dataclass(frozen=True, slots=True)
class ImagePrint:
    """What is remembered of an image.

    Args:
        pixels: digest of its decoded RGB pixels and size: the same whatever the file format.
        shape: pHash, 64 bits: signs of the lowest 8 x 8 cosine coefficients of the 32 x 32 grey picture against their
            median (Zauner 2010; `imagehash.phash` is another rounding of the same).
        colours: 48 bytes, mean RGB of a 4 x 4 grid: pHash sees no colour, and a red mug is no duplicate of a blue one.
    """

    pixels: str
    shape: int
    colours: tuple[int, ...]


def image_print(image: Image.Image) -> ImagePrint:
    """Fingerprint a decoded image (RGB)."""
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    low = _DCT @ np.asarray(grey, dtype=np.float64) @ _DCT.T  # (8, 8)
    low = np.round(low, 3)  # an image of one colour has rounding errors for coefficients
    bits = (low > np.median(low.flat[1:])).flatten()
    bits[0] = False  # the mean is the colours' matter
    colours = image.resize((_GRID, _GRID), Image.Resampling.BOX).tobytes()
    return ImagePrint(digest, int.from_bytes(np.packbits(bits).tobytes(), "big"), tuple(colours))


def looks_like(a: ImagePrint, b: ImagePrint, *, bits: int, colour: int) -> bool:
    """Tell whether two images look the same.

    Args:
        a, b: their prints.
        bits: of the 64 that may differ.
        colour: largest difference of a grid cell's mean, 0-255.
    """
    if (a.shape ^ b.shape).bit_count() > bits:
        return False
    return max(abs(x - y) for x, y in zip(a.colours, b.colours, strict=True)) <= colour


def bands(shape: int, bits: int) -> list[int]:
    """Cut a pHash into `bits` + 1 pieces: prints that differ in at most `bits` bits share one (pigeonhole)."""
    edges = [BITS * i // (bits + 1) for i in range(bits + 2)]
    return [(shape >> a) & ((1 << (b - a)) - 1) for a, b in pairwise(edges)]
