"""What a resolution policy makes of an image: first integers (`plan`), then pixels (`apply`).

Sizes and boxes are Pillow's: (width, height) and (left, top, right, bottom), in pixels. Grids are (rows, columns).
transformers passes (height, width) and LLaVA (width, height): each policy names which rule it follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmllm.data.images import MAX_PIXELS, over_white

Size = tuple[int, int]
Box = tuple[int, int, int, int]
Pixels = Image.Image | np.ndarray | Tensor

MOST_PIXELS = 4 * MAX_PIXELS  # of a view: 256 MP, 768 MiB
RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True)
class Resize:
    """Resize to (width, height), whatever the aspect ratio."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Place:
    """Lay the image on a canvas at (left, top): what is not covered has the colour `fill`, what hangs over is cut."""

    width: int
    height: int
    left: int
    top: int
    fill: tuple[int, int, int] = (0, 0, 0)


View = tuple[Resize | Place, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One input of an encoder.

    Args:
        view: index into the plan's views.
        box: what is cut out of that view.
        encoder: which encoder takes it; policies with two have 0 and 1.
    """

    view: int
    box: Box
    encoder: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Regrid:
    """How the features of tiles become rows again (LLaVA-NeXT): unpadded, perhaps shrunk, a newline behind each row.

    Args:
        rows, columns: of tiles.
        side: patches on a side of a tile.
        top, left, height, width: the rectangle of the joined grid that shows the image, in patches.
        out_height, out_width: what it is resized to; the same numbers where it is not.
    """

    rows: int
    columns: int
    side: int
    top: int
    left: int
    height: int
    width: int
    out_height: int
    out_width: int

    @property
    def num_tokens(self) -> int:
        return self.side**2 + self.out_height * (self.out_width + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What an image becomes, and what it costs.

    Args:
        size: of the image.
        views: versions of the image that tiles are cut from, each a chain of steps; the first has the detail.
        tiles: in the order of the encoder's input and of the text.
        grid: (rows, columns) of the first view's tiles.
        vit_tokens: rows the encoders compute, all tiles together.
        llm_tokens: visual rows in the language model's sequence.
        cross_tokens: visual rows that its cross-attention reads instead.
        text: what stands in the prompt: strings, and numbers of image tokens between them.
        grid_thw: (t, h, w) in patches, native resolution only.
        regrid: LLaVA's any-resolution only.
        frames: of a video; 1 for an image.
    """

    size: Size
    views: tuple[View, ...]
    tiles: tuple[Tile, ...]
    grid: tuple[int, int]
    vit_tokens: int
    llm_tokens: int
    text: tuple[str | int, ...]
    cross_tokens: int = 0
    grid_thw: tuple[int, int, int] | None = None
    regrid: Regrid | None = None
    frames: int = 1

    @property
    def resized(self) -> Size:
        """What the image is resized to where it is shown in most detail, without padding."""
        sizes = [(step.width, step.height) for step in self.views[0] if isinstance(step, Resize)]
        return sizes[-1] if sizes else self.size

    @property
    def encoder_pixels(self) -> int:
        """Pixels that the encoders are given, padding and overviews included."""
        return self.frames * sum((t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in self.tiles)

    @property
    def effective_pixels(self) -> int:
        """Pixels of the image that the best view tells apart: shrinking and cropping lose some, enlarging wins none."""
        return self.frames * max(round(across.kept * down.kept) for across, down in map(self._seen, self.views))

    @property
    def effective_size(self) -> Size:
        """Width and height that the best view tells apart, rounded."""
        across, down = max(map(self._seen, self.views), key=lambda seen: seen[0].kept * seen[1].kept)
        return round(across.kept), round(down.kept)

    @property
    def detail_pixels(self) -> int:
        """Pixels of the tiles that are cut from the view with the detail: the others are overviews."""
        return self.frames * sum((t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in self.tiles if t.view == 0)

    @property
    def shown_pixels(self) -> int:
        """Pixels of those tiles that show the image; the others are padding."""
        across, down = self._seen(self.views[0])
        return self.frames * round(across.shown * down.shown)

    def _seen(self, view: View) -> tuple[_Extent, _Extent]:
        across, down = (_follow(self.size[i], [_axis(step, i) for step in view]) for i in (0, 1))
        return across, down

    @property
    def waste(self) -> float:
        """Share of the encoder's pixels that show nothing more of the image: padding, enlargement, overviews."""
        return max(0.0, 1.0 - self.effective_pixels / self.encoder_pixels)

    def prompt(self, image_token: str) -> str:
        """Return the text with each number of image tokens written out."""
        return "".join(piece if isinstance(piece, str) else image_token * piece for piece in self.text)


def _axis(step: Resize | Place, axis: int) -> tuple[int, int | None]:
    """Return the extent behind a step, and where the image starts in it; None = resized."""
    extent = (step.width, step.height)[axis]
    return extent, None if isinstance(step, Resize) else (step.left, step.top)[axis]


class _Extent(NamedTuple):
    """One axis of the image behind the steps of a view: pixels that survive, and pixels that show it."""

    kept: float
    shown: float


def _follow(length: int, steps: list[tuple[int, int | None]]) -> _Extent:
    """Follow one axis of the image through the steps of a view."""
    extent, low, high, kept = length, 0.0, float(length), float(length)
    for new, offset in steps:
        if offset is None:
            low, high = low * new / extent, high * new / extent
            kept = min(kept, high - low)
        else:
            inside = min(high + offset, new) - max(low + offset, 0.0)
            kept *= inside / (high - low)
            low, high = max(low + offset, 0.0), min(high + offset, new)
        extent = new
    return _Extent(kept, high - low)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A resolution policy: from an image's size to what encoder and language model get.

    Args:
        resample: filter of every resize: nearest, bilinear, bicubic or lanczos (Pillow's, antialiased).
    """

    resample: str = "bicubic"

    def __post_init__(self) -> None:
        if self.resample not in RESAMPLE:
            raise ValueError(f"{type(self).__name__}: resample {self.resample!r} must be one of {sorted(RESAMPLE)}")

    def plan(self, width: int, height: int) -> Plan:
        """Plan an image of width x height pixels.

        Raises:
            ValueError: a size below 1, one that the policy refuses, or one so narrow that a view takes too much memory.
        """
        if width < 1 or height < 1:
            raise ValueError(f"{type(self).__name__}: an image of {width} x {height} pixels; both must be at least 1")
        plan = self._plan(width, height)
        largest = max((step for view in plan.views for step in view), key=lambda step: step.width * step.height)
        if largest.width * largest.height > MOST_PIXELS:
            raise ValueError(
                f"{type(self).__name__}: {width} x {height} would become {largest.width} x {largest.height} pixels, "
                f"more than {MOST_PIXELS}; crop the image first"
            )
        return plan

    def _plan(self, width: int, height: int) -> Plan:
        raise NotImplementedError

    def apply(self, image: Pixels, plan: Plan | None = None) -> tuple[Tensor, ...]:
        """Return an image's tiles: (n, H, W, 3) uint8 for each encoder, in the order of `plan.tiles`.

        Args:
            image: of Pillow (transparency is laid over white), or (H, W, 3) uint8.
            plan: of this size, where it is already there.

        Raises:
            ValueError: the image is no such pixels, or the plan is for another size.
        """
        source = to_image(image)
        plan = self.plan(*source.size) if plan is None else plan
        if plan.size != source.size:
            raise ValueError(f"{type(self).__name__}: a plan for {plan.size} does not fit an image of {source.size}")
        views = [_render(source, view, RESAMPLE[self.resample]) for view in plan.views]
        encoders = max(tile.encoder for tile in plan.tiles) + 1
        parts = [[_cut(views[t.view], t.box) for t in plan.tiles if t.encoder == e] for e in range(encoders)]
        return tuple(torch.from_numpy(np.stack(part)) for part in parts)

    def _check(self, *names: str, least: int = 1) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{type(self).__name__}: {name} must be at least {least}, got {getattr(self, name)}")

    def _check_tokens(self, image_size: str, patch_size: str, shuffle: str | None = None) -> None:
        """Check that a tile's patches, and the blocks of them that become one token, come out even."""
        self._check(image_size, patch_size, *([shuffle] if shuffle else []))
        side = getattr(self, image_size) // getattr(self, patch_size)
        block = getattr(self, shuffle) if shuffle else 1
        if side < 1 or side % block:
            raise ValueError(
                f"{type(self).__name__}: {image_size} {getattr(self, image_size)} and {patch_size} "
                f"{getattr(self, patch_size)} make {side} patches a side, which {block} must divide"
            )


def to_image(pixels: Pixels) -> Image.Image:
    """Return pixels as an RGB image.

    Raises:
        ValueError: an array that is not (H, W, 3) uint8.
    """
    if isinstance(pixels, Image.Image):
        return pixels if pixels.mode == "RGB" else over_white(pixels)
    array = pixels.cpu().numpy() if isinstance(pixels, Tensor) else pixels
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image must be (H, W, 3) uint8, got {tuple(array.shape)} {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _render(image: Image.Image, view: View, resample: Image.Resampling) -> np.ndarray:
    for step in view:
        if isinstance(step, Resize):
            image = image.resize((step.width, step.height), resample)
        else:
            canvas = Image.new("RGB", (step.width, step.height), step.fill)
            canvas.paste(image, (step.left, step.top))
            image = canvas
    return np.array(image)  # (H, W, 3)


def _cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    left, top, right, bottom = box
    return pixels[top:bottom, left:right]


def grid_boxes(rows: int, columns: int, size: int) -> list[Box]:
    """Return the boxes of rows x columns squares, row by row."""
    return [(c * size, r * size, (c + 1) * size, (r + 1) * size) for r in range(rows) for c in range(columns)]


def join_text(pieces: Iterable[str | int]) -> tuple[str | int, ...]:
    """Join neighbouring strings and drop empty ones; numbers of image tokens stay apart."""
    joined: list[str | int] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, str) and isinstance(last, str):
            joined[-1] = last + piece
        elif piece != "":
            joined.append(piece)
    return tuple(joined)
