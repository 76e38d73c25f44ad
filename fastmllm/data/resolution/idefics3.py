"""Tiles whose row and column are named in the text, an overview last: Idefics3 and SmolVLM."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastmllm.data.resolution.plan import Plan, Policy, Resize, Size, Tile, grid_boxes, join_text

MOST = 4096  # no side is larger before it is cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Idefics3(Policy):
    """Resize the longer side, stretch both to multiples of the tile, cut, and say in the text where each tile stood.

    Args:
        longest_edge: what the longer side is resized to, smaller images too, pixels.
        image_size: side of a tile, pixels.
        patch_size: of the encoder, pixels.
        shuffle: side of the block of patches that becomes one token.
        split: without it the image is one tile.
        around, overview: the tokens in front of each tile and behind the last one, and of the overview.

    SmolVLM: `Idefics3(longest_edge=2048, image_size=512, patch_size=16, shuffle=4)`.

    Equal to `Idefics3ImageProcessor`, `SmolVLMImageProcessor` and the text of their processors (arXiv 2408.12637). The
    overview is resized from the stretched image, not from the original.
    """

    resample: str = "lanczos"
    longest_edge: int = 4 * 364
    image_size: int = 364
    patch_size: int = 14
    shuffle: int = 2
    split: bool = True
    around: str = "<fake_token_around_image>"
    overview: str = "<global-img>"

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self._check_tokens("image_size", "patch_size", "shuffle")
        self._check("longest_edge")

    def _plan(self, width: int, height: int) -> Plan:
        size, side = self.image_size, self.image_size // self.patch_size
        first = _below(_longest(width, height, self.longest_edge), MOST)
        stretched = _multiples(first, size) if self.split else (size, size)
        rows, columns = stretched[1] // size, stretched[0] // size
        views: list[tuple[Resize, ...]] = [(Resize(*first), Resize(*stretched))]
        tiles = [Tile(view=0, box=box) for box in grid_boxes(rows, columns, size)]
        tokens = (side // self.shuffle) ** 2
        pieces: list[str | int] = []
        if len(tiles) > 1:
            views.append((*views[0], Resize(size, size)))
            tiles.append(Tile(view=1, box=(0, 0, size, size)))
            for row in range(1, rows + 1):
                for column in range(1, columns + 1):
                    pieces += [f"{self.around}<row_{row}_col_{column}>", tokens]
                pieces.append("\n")
            pieces.append("\n")
        pieces += [f"{self.around}{self.overview}", tokens, self.around]
        return Plan(
            size=(width, height),
            views=tuple(views),
            tiles=tuple(tiles),
            grid=(rows, columns),
            vit_tokens=len(tiles) * side**2,
            llm_tokens=len(tiles) * tokens,
            text=join_text(pieces),
        )


def _longest(width: int, height: int, longest: int) -> Size:
    """Return the size with the longer side `longest`, the other one cut to an integer and made even."""
    ratio = width / height
    if width >= height:
        other = int(longest / ratio)
        return longest, max(other + other % 2, 1)
    other = int(longest * ratio)
    return max(other + other % 2, 1), longest


def _below(size: Size, most: int) -> Size:
    width, height = size
    ratio = width / height
    if width >= height and width > most:
        width, height = most, int(most / ratio)
    elif height > width and height > most:
        width, height = int(most * ratio), most
    return max(width, 1), max(height, 1)


def _multiples(size: Size, tile: int) -> Size:
    """Return both sides rounded up to tiles, the longer one first; the other follows its aspect ratio."""
    width, height = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return width, height
