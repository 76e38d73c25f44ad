"""Tiles whose row and column are named in the text, an overview first: nanoVLM."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastmllm.data.resolution.plan import Plan, Policy, Resize, Tile, grid_boxes

MOST_ROWS = 8  # its tokenizer names as many rows and columns


@dataclass(frozen=True, kw_only=True, slots=True)
class NanoVLM(Policy):
    """Stretch both sides to multiples of the tile and cut; an image of one tile has no row and column.

    Args:
        longest_edge: the longer side in pixels, a multiple of `image_size`, at most 8 tiles.
        grow: enlarge smaller images to it (`resize_to_max_side_len`); otherwise the longer side is rounded up.
        image_size: side of a tile, pixels.
        patch_size: of the encoder, pixels.
        shuffle: side of the block of patches that becomes one token.
        overview: token in front of the overview.

    Equal to nanoVLM's `DynamicResize`, `GlobalAndSplitImages` and `get_image_string` in sizes, order and text. Its
    pixels of the overview differ by rounding: it resizes floats (bilinear), where this one resizes bytes.
    """

    longest_edge: int = 2048
    grow: bool = True
    image_size: int = 512
    patch_size: int = 16
    shuffle: int = 4
    overview: str = "<|global_image|>"

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self._check_tokens("image_size", "patch_size", "shuffle")
        if self.longest_edge % self.image_size or not 0 < self.longest_edge <= MOST_ROWS * self.image_size:
            raise ValueError(
                f"NanoVLM: longest_edge {self.longest_edge} must be 1 to {MOST_ROWS} times image_size {self.image_size}"
            )

    def _plan(self, width: int, height: int) -> Plan:
        size, side = self.image_size, self.image_size // self.patch_size
        longer, shorter = max(width, height), min(width, height)
        long = self.longest_edge if self.grow else min(self.longest_edge, math.ceil(longer / size) * size)
        short = max(math.ceil(shorter * (long / longer) / size) * size, size)
        across, down = (long, short) if width >= height else (short, long)
        rows, columns = down // size, across // size
        tokens = (side // self.shuffle) ** 2
        views: list[tuple[Resize, ...]] = [(Resize(across, down),)]
        tiles = [Tile(view=0, box=box) for box in grid_boxes(rows, columns, size)]
        text: list[str | int] = [self.overview, tokens]
        if len(tiles) > 1:
            views.append((*views[0], Resize(size, size)))
            tiles.insert(0, Tile(view=1, box=(0, 0, size, size)))
            for row in range(1, rows + 1):
                for column in range(1, columns + 1):
                    text += [f"<row_{row}_col_{column}>", tokens]
        return Plan(
            size=(width, height),
            views=tuple(views),
            tiles=tuple(tiles),
            grid=(rows, columns),
            vit_tokens=len(tiles) * side**2,
            llm_tokens=len(tiles) * tokens,
            text=tuple(text),
        )
