"""Average or interpolate the token grid: the yardstick of every learned compressor.

Matryoshka multimodal models (arXiv 2405.17430; nested sets of 1, 9, 36, 144 tokens), LLaVA-OneVision's video pooling
(arXiv 2408.03326; bilinear), LLaVA-NeXT-Video (average).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Compressor, Evidence, Mode, Position
from fastmllm.compression.regrid import blocks, centres, grids_of, of_each, pooled_grid, rebuild
from fastmllm.compression.tokens import Grid, Plan, Tokens
from fastmllm.kernels.token_pool import token_pool


class Pool(Compressor):
    """Pool every image's grid to K tokens, as much of the grid's own shape as the factors of K allow.

    A pooling commutes with a linear layer: behind one it gives what it gives in front, for a K-th of the work. Where
    windows do not overlap, the plan says in `assign` which one each token is in.

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
        grids = grids_of(self.name, tokens)
        out = tuple(pooled_grid(self.name, grid, k) for grid, k in zip(grids, budgets, strict=True))

        def pooled(plane: Tensor) -> Tensor:
            return pool_plane(plane, grids, out, self.interpolation)

        sides = {pair for a, b in zip(grids, out, strict=True) for pair in zip(a, b, strict=True)}
        apart = all(_apart(n, k, self.interpolation) for n, k in sides)
        return rebuild(
            tokens, pooled(tokens.x), budgets, of_each(centres, grids, out), grid=out, mix=pooled,
            assign=of_each(blocks, grids, out) if apart else None,
        )  # fmt: skip


def pool_plane(plane: Tensor, grids: Sequence[Grid], out: Sequence[Grid], mode: str = "average") -> Tensor:
    """Pool (T, ...) of the grids to (K, ...) of the grids `out`."""
    flat = plane.reshape(len(plane), -1)
    pooled = token_pool(flat, grids, size=[g[1:] for g in out], mode=mode)
    return pooled.view(-1, *plane.shape[1:])


def _apart(extent: int, count: int, interpolation: str) -> bool:
    """Say whether each of `extent` tokens is in one of `count` outputs alone, with the weight of its neighbours."""
    factor, rest = divmod(extent, count)
    return not rest and (interpolation == "average" or factor <= 2)  # further apart, bilinear skips tokens
