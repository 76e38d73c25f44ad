"""Average or interpolate the token grid: the yardstick of every learned compressor.

Matryoshka multimodal models (arXiv 2405.17430; nested sets of 1, 9, 36, 144 tokens), LLaVA-OneVision's video pooling
(arXiv 2408.03326; bilinear), LLaVA-NeXT-Video (average).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Compressor, Evidence, Mode, Position
from fastmllm.compression.tokens import Grid, Plan, Tokens, boundaries
from fastmllm.kernels.token_pool import token_pool


class Pool(Compressor):
    """Pool every image's grid to K tokens, as much of the grid's own shape as the factors of K allow.

    Args:
        keep: K, a fraction, or one K an image; frames of a video are pooled each for itself, to K / frames.
        interpolation: "average" over the window of each output, or "bilinear" (align_corners=False).
        position: see `Compressor`; a pooled token stands at the middle of its window.
        mode: "clean" only.
    """

    name = "pool"

    def __init__(
        self, keep: Budget, *, interpolation: Literal["average", "bilinear"] = "average", position: Position = "keep",
        mode: Mode = "clean",
    ) -> None:  # fmt: skip
        super().__init__(keep, position=position, mode=mode)
        if interpolation not in ("average", "bilinear"):
            raise ValueError(f"pool: interpolation {interpolation!r} is not one of average, bilinear")
        self.interpolation = interpolation

    def nested(self, tokens: Tokens, sizes: Sequence[int]) -> list[Tokens]:
        """Return one set for each K of `sizes`, from one encoding: what a Matryoshka loss averages over."""
        return [Pool(k, interpolation=self.interpolation, position=self.position)(tokens)[0] for k in sizes]

    def reduce(self, tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> tuple[Tokens, Plan | None]:
        if tokens.grid is None:
            raise ValueError("pool: the tokens are no square grid, and none is given: Tokens.of(x, grids=...)")
        out = [pooled_grid(grid, k) for grid, k in zip(tokens.grid, budgets, strict=True)]
        x = token_pool(tokens.x, tokens.grid, size=[g[1:] for g in out], mode=self.interpolation)
        centres = torch.cat([_centres(a, b) for a, b in zip(tokens.grid, out, strict=True)])
        starts = torch.tensor([0, *tokens.seqlens[:-1]]).cumsum(0).repeat_interleave(torch.tensor(budgets))
        keep = (centres + starts).to(x.device, non_blocking=True)
        cu_seqlens = boundaries(budgets, x.device)[0]
        mass = torch.cat([torch.full((k,), n / k) for n, k in zip(tokens.seqlens, budgets, strict=True)])
        pooled = Tokens(
            x=x, cu_seqlens=cu_seqlens, seqlens=budgets, grid=tuple(out), pos=tokens.pos.index_select(0, keep),
            size=mass.to(x.device, non_blocking=True),
            planes=tuple(
                token_pool(plane, tokens.grid, size=[g[1:] for g in out], mode=self.interpolation)
                if plane.is_floating_point() else plane.index_select(0, keep)
                for plane in tokens.planes
            ),
        )  # fmt: skip
        return pooled, Plan(keep=keep)


def pooled_grid(grid: Grid, keep: int) -> Grid:
    """Return the grid of `keep` tokens: of all factors that fit, those nearest to the shape of the grid.

    Raises:
        ValueError: no factors of K fit the rows and columns, or K is no multiple of the frames.
    """
    frames, rows, columns = grid
    each, rest = divmod(keep, frames)
    fits = [(r, each // r) for r in range(1, rows + 1) if each and each % r == 0 and each // r <= columns]
    if rest or not fits:
        raise ValueError(
            f"pool: {keep} tokens do not form a grid within {frames} x {rows} x {columns}; take a product of two "
            "numbers"
        )
    shape = min(fits, key=lambda s: max(s[0] * columns / (s[1] * rows), s[1] * rows / (s[0] * columns)))
    return frames, *shape


def _centres(grid: Grid, pooled: Grid) -> torch.Tensor:
    """Return the token in the middle of each pooled one's window, (K,) int64 in its segment."""
    frames, rows, columns = grid
    row, column = ((2 * torch.arange(k) + 1) * n // (2 * k) for n, k in zip(grid[1:], pooled[1:], strict=True))
    place = row[:, None] * columns + column  # (h', w')
    return (torch.arange(frames)[:, None, None] * rows * columns + place).flatten()
