"""InternVL's dynamic tiling: the nearest aspect ratio, stretched, with a thumbnail."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fastmllm.data.resolution.plan import Plan, Policy, Resize, Tile, grid_boxes


@dataclass(frozen=True, kw_only=True, slots=True)
class InternVL(Policy):
    """Stretch the image to the grid of tiles whose aspect ratio is nearest; an overview comes last.

    Args:
        image_size: side of a tile, pixels.
        patch_size: of the encoder, pixels.
        shuffle: side of the block of patches that becomes one token (pixel shuffle).
        min_tiles, max_tiles: tiles of a grid, without the overview.
        thumbnail: whether the overview is added where there is more than one tile.
        prefix_tokens: rows of the encoder beside the patches.
        start, end: text around the image.

    Equal to `dynamic_preprocess` of InternVL (arXiv 2404.16821) and to `GotOcr2ImageProcessor` of transformers, which
    its InternVL processor runs. Their grids come in another order among those of equal tile count, which matters only
    for ties between two of them; here it is transformers': columns ascending.
    """

    image_size: int = 448
    patch_size: int = 14
    shuffle: int = 2
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    prefix_tokens: int = 0
    start: str = "<img>"
    end: str = "</img>"

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self._check_tokens("image_size", "patch_size", "shuffle")
        self._check("min_tiles")
        self._check("prefix_tokens", least=0)
        if self.max_tiles < self.min_tiles:
            raise ValueError(f"InternVL: max_tiles {self.max_tiles} is less than min_tiles {self.min_tiles}")

    def _plan(self, width: int, height: int) -> Plan:
        size, side = self.image_size, self.image_size // self.patch_size
        rows, columns = nearest_grid(width, height, size, self.min_tiles, self.max_tiles)
        tiles = [Tile(view=0, box=box) for box in grid_boxes(rows, columns, size)]
        views: list[tuple[Resize, ...]] = [(Resize(columns * size, rows * size),)]
        if self.thumbnail and len(tiles) > 1:
            views.append((Resize(size, size),))
            tiles.append(Tile(view=1, box=(0, 0, size, size)))
        tokens = len(tiles) * (side // self.shuffle) ** 2
        return Plan(
            size=(width, height),
            views=tuple(views),
            tiles=tuple(tiles),
            grid=(rows, columns),
            vit_tokens=len(tiles) * (side**2 + self.prefix_tokens),
            llm_tokens=tokens,
            text=(self.start, tokens, self.end),
        )


@cache
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Return (columns, rows) of every grid of least to most tiles, by tiles, then by columns."""
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1) if c * r >= least]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def nearest_grid(width: int, height: int, tile: int, least: int, most: int) -> tuple[int, int]:
    """Return (rows, columns) of the nearest aspect ratio.

    Among equal ones the next larger wins as long as the image has more than half its pixels.
    """
    nearest, found = float("inf"), (1, 1)
    for columns, rows in _grids(least, most):
        distance = abs(width / height - columns / rows)
        if distance < nearest:
            nearest, found = distance, (rows, columns)
        elif distance == nearest and width * height > 0.5 * tile * tile * columns * rows:
            found = (rows, columns)
    return found
