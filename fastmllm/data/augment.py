"""Variations of a drawing, each a file of its own: a path always means the same pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from fastmllm.data.images import open_image, save_png

VERSION = 2  # raise it when a transformation changes, so that cached files are not mistaken for the new ones
BRIGHTNESS = (0.8, 1.2)
SCALE = (0.8, 1.0)
TINT = (255, 190, 130, 255)


def rng_of(*parts: object) -> np.random.Generator:
    """Return a generator that depends on nothing but the text of `parts` (Python's own hash changes by process)."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def light(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Return a lightly changed copy: mirrored or not, brighter or darker, a little smaller, a little aside.

    Kept light on purpose: with rotation and colour matrices a small budget ends underfitted.

    Args:
        image: RGBA; the ground stays transparent, so that only the drawing changes.
        generator: decides everything.
    """
    width, height = image.size
    if generator.random() < 0.5:
        image = ImageOps.mirror(image)
    scale = generator.uniform(*SCALE)
    small = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    canvas = Image.new("RGBA", (width, height))
    left = int(generator.integers(0, width - small.width + 1))
    top = int(generator.integers(0, height - small.height + 1))
    canvas.paste(small, (left, top))
    return ImageEnhance.Brightness(canvas).enhance(generator.uniform(*BRIGHTNESS))


def held_out(image: Image.Image) -> Image.Image:
    """Return the drawing as `light` never makes it: mirrored, turned by 12 degrees and tinted.

    Stands in for an unseen team where there is one team only.
    """
    turned = ImageOps.mirror(image).rotate(12, resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(turned, dtype=np.float32) * (np.asarray(TINT, dtype=np.float32) / 255.0)
    return Image.fromarray(pixels.round().astype(np.uint8))


def variants(path: Path, *, name: str, folder: Path, num: int, seed: int) -> list[Path]:
    """Return the drawing and `num` light variations, writing those that are not there yet.

    Args:
        path: the drawing.
        name: what names the files; also part of the seed.
        folder: where the variations go.
        num: how many beside the drawing itself.
        seed: which ones.
    """
    missing: Sequence[int] = range(1, num + 1)
    targets = [folder / f"{name}-v{VERSION}-s{seed}-{index}.png" for index in missing]
    todo = [(index, target) for index, target in zip(missing, targets, strict=True) if not target.exists()]
    if todo:
        image = open_image(path, alpha=True)
        for index, target in todo:
            save_png(light(image, rng_of("light", VERSION, seed, folder.name, name, index)), target)
    return [path, *targets]


def transformed(path: Path, *, name: str, folder: Path) -> Path:
    """Return the held-out transformation of a drawing, writing it if it is not there yet."""
    target = folder / f"{name}-h{VERSION}.png"
    if not target.exists():
        save_png(held_out(open_image(path, alpha=True)), target)
    return target
