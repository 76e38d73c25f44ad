"""Put the features of any-resolution tiles together again, with a learned newline behind each row (LLaVA-NeXT)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

import fastmllm.kernels.splice_tokens  # noqa: F401 - registers the operator
from fastmllm.kernels.token_pool import token_pool


class Regrid(Hashable, Protocol):
    """How an image's tiles lie, in host integers (`fastmllm.data.resolution.Regrid`); hashable."""

    @property
    def rows(self) -> int: ...  # of tiles
    @property
    def columns(self) -> int: ...
    @property
    def side(self) -> int: ...  # patches on a side of a tile
    @property
    def top(self) -> int: ...  # the rectangle of the joined grid that shows the image, in patches
    @property
    def left(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def out_height(self) -> int: ...  # what it is resized to
    @property
    def out_width(self) -> int: ...


class AnyResPacker(nn.Module):
    """Pack the features of images in tiles: the overview, then the joined tiles row by row, a newline behind each row.

    Args:
        width: D of the features, which is the language model's where they are projected before.

    Equal to `pack_image_features` of transformers' LlavaNextModel and LlavaOnevisionModel (arXiv 2408.03326), and to
    `spatial_unpad` of LLaVA-NeXT. Padding is left out, and shrunk grids are resized bilinearly. One move of each row
    with an index made on the host; only shrunk grids are moved before.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"AnyResPacker: width must be at least 1, got {width}")
        self.newline = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, features: Tensor, regrids: Sequence[Regrid | None]) -> tuple[Tensor, list[int]]:
        """Pack the tokens of all images.

        Args:
            features: (I, N, D) of all tiles, image after image: the overview, then its tiles row by row.
            regrids: on the host, one for each image; None = a single tile, with one newline behind it.

        Returns:
            (T, D), image after image, and the tokens of each image.

        Raises:
            ValueError: features and regrids do not fit together.
        """
        if features.dim() != 3 or features.shape[2] != self.newline.shape[0]:
            raise ValueError(
                f"AnyResPacker: features {tuple(features.shape)} must be (tiles, N, {self.newline.shape[0]})"
            )
        num_tiles, num_tokens, _ = features.shape
        needed = sum(_num_tiles(regrid) for regrid in regrids)
        if needed != num_tiles:
            raise ValueError(f"AnyResPacker: features of {num_tiles} tiles, but the images have {needed}")
        wrong = [regrid.side for regrid in regrids if regrid is not None and regrid.side**2 != num_tokens]
        if wrong:
            raise ValueError(f"AnyResPacker: tiles of {num_tokens} tokens are not the {wrong[0]} x {wrong[0]} planned")
        plan = _plan(tuple(regrids), num_tokens)
        rows = features.reshape(-1, features.shape[2])
        others = self.newline.to(rows.dtype).expand(plan.num_newlines, -1)
        shrunk = [r for r in regrids if r is not None and _is_shrunk(r)]
        if shrunk:
            joined = rows.index_select(0, plan.kept.to(rows.device, non_blocking=True))
            sizes = [(r.out_height, r.out_width) for r in shrunk]
            pooled = token_pool(joined, [(r.height, r.width) for r in shrunk], size=sizes, mode="bilinear")
            others = torch.cat((pooled, others))
        index = [t.to(rows.device, non_blocking=True) for t in (plan.source, plan.feature_rows, plan.other_rows)]
        return torch.ops.fastmllm.splice_tokens(rows, others, *index), list(plan.lengths)


def _num_tiles(regrid: Regrid | None) -> int:
    return 1 if regrid is None else 1 + regrid.rows * regrid.columns


def _is_shrunk(regrid: Regrid) -> bool:
    return (regrid.height, regrid.width) != (regrid.out_height, regrid.out_width)


@lru_cache(maxsize=256)
def _joined(regrid: Regrid) -> np.ndarray:
    """Return (h, w): the feature row, counted from the image's overview, of each place of the unpadded grid."""
    side, tiles = regrid.side, regrid.rows * regrid.columns
    inside = np.arange(side**2, (tiles + 1) * side**2).reshape(regrid.rows, regrid.columns, side, side)
    grid = inside.swapaxes(1, 2).reshape(regrid.rows * side, regrid.columns * side)
    return grid[regrid.top : regrid.top + regrid.height, regrid.left : regrid.left + regrid.width]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Where rows come from and go to: features, and behind them the others: rows of shrunk grids, then newlines.

    Args:
        source: (T,) row of cat(features, others) that each output row takes.
        feature_rows: the output row of each feature; -1 where it goes nowhere (padding).
        other_rows: of each other row.
        kept: the features that shrinking reads.
        num_newlines: how many.
        lengths: tokens of each image.
    """

    source: Tensor
    feature_rows: Tensor
    other_rows: Tensor
    kept: Tensor
    num_newlines: int
    lengths: tuple[int, ...]


@lru_cache(maxsize=64)
def _plan(regrids: tuple[Regrid | None, ...], num_tokens: int) -> _Plan:
    features = sum(_num_tiles(regrid) for regrid in regrids) * num_tokens
    newline = features + sum(r.out_height * r.out_width for r in regrids if r is not None and _is_shrunk(r))
    parts: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    lengths: list[int] = []
    first, pooled, newlines = 0, features, 0
    for regrid in regrids:
        overview = first + np.arange(num_tokens)
        if regrid is None:
            grid = np.empty((1, 0), np.int64)
        elif _is_shrunk(regrid):
            kept.append(first + _joined(regrid).ravel())
            grid = pooled + np.arange(regrid.out_height * regrid.out_width).reshape(regrid.out_height, -1)
            pooled += grid.size
        else:
            grid = first + _joined(regrid)
        ends = newline + newlines + np.arange(len(grid))
        image = np.concatenate((overview, np.concatenate((grid, ends[:, None]), 1).ravel()))
        parts.append(image)
        lengths.append(len(image))
        newlines += len(grid)
        first += _num_tiles(regrid) * num_tokens
    source = np.concatenate(parts) if parts else np.empty(0, np.int64)
    goes = np.full(newline + newlines, -1, np.int64)
    goes[source] = np.arange(source.size)
    return _Plan(
        source=torch.from_numpy(source),
        feature_rows=torch.from_numpy(goes[:features]),
        other_rows=torch.from_numpy(goes[features:]),
        kept=torch.from_numpy(np.concatenate(kept) if kept else np.empty(0, np.int64)),
        num_newlines=newlines,
        lengths=tuple(lengths),
    )
