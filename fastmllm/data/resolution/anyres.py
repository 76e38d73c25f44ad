"""LLaVA's any-resolution: an overview and tiles of the best of some canvases (LLaVA-NeXT, LLaVA-OneVision)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastmllm.data.resolution.plan import Place, Plan, Policy, Regrid, Resize, Size, Tile, grid_boxes

SOURCES = ("transformers", "llava")
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ONEVISION_PINPOINTS = tuple((384 * first, 384 * second) for first in range(1, 7) for second in range(1, 7))


@dataclass(frozen=True, kw_only=True, slots=True)
class AnyRes(Policy):
    """Resize into the canvas that keeps most of the image, pad it, cut it into tiles; a squashed overview comes first.

    Args:
        image_size: side of a tile, pixels.
        patch_size: of the encoder, pixels.
        pinpoints: the canvases, as a checkpoint's `image_grid_pinpoints` lists them.
        max_tiles: k of `anyres_max_k`: joined features of more than 1.21 k tiles are shrunk to k; None = never.
        source: whose code is followed where the two differ. "transformers" reads pinpoints as (height, width) and
            unpads to int(round(x, 7)) patches; "llava" reads (width, height) and unpads to int(x). The order decides
            ties (a small square image becomes wide there and tall here), the rounding about 25 sizes in a million.
        prefix_tokens: rows of the encoder beside the patches.

    LLaVA-OneVision: `AnyRes(image_size=384, pinpoints=ONEVISION_PINPOINTS, max_tiles=9)`.

    Equal to `LlavaNextImageProcessor` and `LlavaOnevisionImageProcessor` of transformers and to
    `process_anyres_image` of LLaVA-NeXT; the overview is squashed there too, marked as a bug that is kept.
    """

    image_size: int = 336
    patch_size: int = 14
    pinpoints: tuple[Size, ...] = PINPOINTS
    max_tiles: int | None = None
    source: str = "transformers"
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self._check_tokens("image_size", "patch_size")
        self._check("prefix_tokens", least=0)
        if self.source not in SOURCES:
            raise ValueError(f"AnyRes: source {self.source!r} must be one of {SOURCES}")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"AnyRes: max_tiles must be at least 1, got {self.max_tiles}")
        wrong = [p for p in self.pinpoints if min(p) < 1 or p[0] % self.image_size or p[1] % self.image_size]
        if wrong or not self.pinpoints:
            raise ValueError(f"AnyRes: pinpoints {wrong} must be one or more multiples of image_size {self.image_size}")

    def _plan(self, width: int, height: int) -> Plan:
        size, side = self.image_size, self.image_size // self.patch_size
        high_first = self.source == "transformers"
        canvases = [(b, a) if high_first else (a, b) for a, b in self.pinpoints]
        canvas = best_canvas(width, height, canvases)
        resized = fit_inside(width, height, canvas)
        left, top = (canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2
        columns, rows = canvas[0] // size, canvas[1] // size
        regrid = self._regrid(width, height, rows, columns)
        return Plan(
            size=(width, height),
            views=((Resize(*resized), Place(*canvas, left, top)), (Resize(size, size),)),
            tiles=(
                Tile(view=1, box=(0, 0, size, size)),
                *(Tile(view=0, box=box) for box in grid_boxes(rows, columns, size)),
            ),
            grid=(rows, columns),
            vit_tokens=(rows * columns + 1) * (side**2 + self.prefix_tokens),
            llm_tokens=regrid.num_tokens,
            text=(regrid.num_tokens,),
            regrid=regrid,
        )

    def _regrid(self, width: int, height: int, rows: int, columns: int) -> Regrid:
        side = self.image_size // self.patch_size
        across, down = columns * side, rows * side
        digits = 7 if self.source == "transformers" else None
        top = left = 0
        if width / height > across / down:
            top = (down - _whole(height * (across / width), digits)) // 2
        else:
            left = (across - _whole(width * (down / height), digits)) // 2
        down, across = down - 2 * top, across - 2 * left
        out_height, out_width = down, across
        if self.max_tiles is not None:
            ratio = math.sqrt(down * across / (self.max_tiles * side**2))
            if ratio > 1.1:
                out_height, out_width = int(down // ratio), int(across // ratio)
        return Regrid(
            rows=rows, columns=columns, side=side, top=top, left=left, height=down, width=across,
            out_height=out_height, out_width=out_width,
        )  # fmt: skip


def _whole(value: float, digits: int | None) -> int:
    return int(value if digits is None else round(value, digits))


def best_canvas(width: int, height: int, canvases: list[Size]) -> Size:
    """Return the first (width, height) that keeps most pixels of the image, and of those wastes least of its own.

    Equal to `select_best_resolution` of LLaVA and transformers.
    """
    best, found = None, (0, 0)
    for across, down in canvases:
        scale = min(across / width, down / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        merit = (effective, effective - across * down)
        if effective and (best is None or merit > best):
            best, found = merit, (across, down)
    if best is None:
        raise ValueError(f"AnyRes: {width} x {height} is too narrow: it has no whole pixel in any of {canvases}")
    return found


def fit_inside(width: int, height: int, canvas: Size) -> Size:
    """Return the largest size of the same aspect ratio inside a canvas, the free side rounded up."""
    scale_w, scale_h = canvas[0] / width, canvas[1] / height
    if scale_w < scale_h:
        return canvas[0], min(math.ceil(height * scale_w), canvas[1])
    return min(math.ceil(width * scale_h), canvas[0]), canvas[1]
