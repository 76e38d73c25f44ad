"""Llama-3.2-Vision's tiles: the canvas that needs least scaling, padded at the right and at the bottom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from fastmllm.data.resolution.plan import Place, Plan, Policy, Resize, Size, Tile, grid_boxes


@dataclass(frozen=True, kw_only=True, slots=True)
class Mllama(Policy):
    """Fit the image into a canvas of up to `max_tiles` tiles.

    Args:
        image_size: side of a tile, pixels.
        patch_size: of the encoder, pixels.
        max_tiles: tiles of an image; a batch of transformers always has as many, the rest masked.
        prefix_tokens: rows of the encoder beside the patches; cross-attention reads them too.
        image_token: stands in the text for the image; it is a text token, no visual row.

    Equal to `MllamaImageProcessor` of transformers.
    """

    resample: str = "bilinear"
    image_size: int = 560
    patch_size: int = 14
    max_tiles: int = 4
    prefix_tokens: int = 1
    image_token: str = "<|image|>"

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self._check_tokens("image_size", "patch_size")
        self._check("max_tiles")
        self._check("prefix_tokens", least=0)

    def _plan(self, width: int, height: int) -> Plan:
        size = self.image_size
        rows, columns = best_grid(width, height, size, self.max_tiles)
        resized = _fit(width, height, (columns * size, rows * size), size)
        tokens = rows * columns * ((size // self.patch_size) ** 2 + self.prefix_tokens)
        return Plan(
            size=(width, height),
            views=((Resize(*resized), Place(columns * size, rows * size, 0, 0)),),
            tiles=tuple(Tile(view=0, box=box) for box in grid_boxes(rows, columns, size)),
            grid=(rows, columns),
            vit_tokens=tokens,
            llm_tokens=0,
            cross_tokens=tokens,
            text=(self.image_token,),
        )

    def aspect_ratio_id(self, plan: Plan) -> int:
        """Return the number of the plan's grid among all grids, from 1: `aspect_ratio_ids`, where 0 is no image."""
        return _grids(self.max_tiles).index(plan.grid) + 1

    def tile_mask(self, plan: Plan) -> tuple[int, ...]:
        """Return 1 for each tile of the plan and 0 for those missing to `max_tiles`: `aspect_ratio_mask`."""
        return (1,) * len(plan.tiles) + (0,) * (self.max_tiles - len(plan.tiles))


@cache
def _grids(most: int) -> tuple[tuple[int, int], ...]:
    """Return (rows, columns) of every grid of at most so many tiles."""
    return tuple((r, c) for r in range(1, most + 1) for c in range(1, most // r + 1))


def best_grid(width: int, height: int, tile: int, most: int) -> tuple[int, int]:
    """Return (rows, columns) of the canvas to enlarge the image least for, or else to shrink it least; then fewest."""
    scales = [(min(c * tile / width, r * tile / height), r, c) for r, c in _grids(most)]
    enlarging = [scale for scale, _, _ in scales if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scale for scale, _, _ in scales)
    rows, columns = min(((r, c) for scale, r, c in scales if scale == chosen), key=lambda grid: grid[0] * grid[1])
    return rows, columns


def _fit(width: int, height: int, canvas: Size, tile: int) -> Size:
    """Return the size inside the canvas; an image smaller than a tile grows to one, no further."""
    across, down = (min(max(have, tile), most) for have, most in zip((width, height), canvas, strict=True))
    scale_w, scale_h = across / width, down / height
    if scale_w < scale_h:
        return across, min(math.floor(height * scale_w) or 1, down)
    return min(math.floor(width * scale_h) or 1, across), down
