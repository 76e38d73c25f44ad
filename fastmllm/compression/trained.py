"""What compressors with weights share: their widths, and images that keep all of their tokens pass by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmllm.compression.budget import Budget, tokens_to_keep
from fastmllm.compression.compressor import Compressor, Evidence, Mode, Position
from fastmllm.compression.tokens import Plan, Tokens, boundaries


class Trained(Compressor):
    """Compute K new tokens of an image from all of its tokens, with weights.

    K = N leaves an image as it is, which asks for one width on both sides.

    Args:
        keep: see `Compressor`.
        width: C of the tokens.
        width_out: of what comes out; None: the same.
        position: see `Compressor`.
        mode: "clean" only.
    """

    def __init__(
        self, keep: Budget, width: int, width_out: int | None, *, position: Position = "keep", mode: Mode = "clean"
    ) -> None:
        super().__init__(keep, position=position, mode=mode)
        self.width, self.width_out = width, width if width_out is None else width_out
        if min(self.width, self.width_out) < 1:
            raise ValueError(f"{self.name}: widths must be >= 1, got {self.width} and {self.width_out}")

    def forward(
        self, tokens: Tokens, evidence: Evidence | None = None, budgets: tuple[int, ...] | None = None
    ) -> tuple[Tokens, Plan | None]:
        budgets = tokens_to_keep(self.name, self.keep if budgets is None else budgets, tokens.seqlens)
        if tokens.x.shape[1] != self.width:
            raise ValueError(f"{self.name}: tokens of width {tokens.x.shape[1]}, but its weights are for {self.width}")
        if self.width_out != self.width and any(k == n for k, n in zip(budgets, tokens.seqlens, strict=True)):
            raise ValueError(
                f"{self.name}: budgets {budgets[:4]} of {tokens.seqlens[:4]} tokens: an image that keeps all of them "
                f"stays as it is, {self.width} wide, but the others become {self.width_out}: keep fewer"
            )
        return super().forward(tokens, evidence, budgets)

    def reduce(self, tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> tuple[Tokens, Plan | None]:
        whole = [k == n for k, n in zip(budgets, tokens.seqlens, strict=True)]
        if not any(whole):
            return self.compute(tokens, budgets)
        some = [i for i, same in enumerate(whole) if not same]
        part, plan = self.compute(_images(tokens, some), tuple(budgets[i] for i in some))
        return _joined(tokens, part, whole, budgets), None if plan is None else _plan(tokens, plan, whole, budgets)

    def compute(self, tokens: Tokens, budgets: tuple[int, ...]) -> tuple[Tokens, Plan | None]:
        """Do it for images that all keep fewer tokens than they have."""
        raise NotImplementedError


def _images(tokens: Tokens, images: Sequence[int]) -> Tokens:
    """Return some of the images."""

    def of(plane: Tensor) -> Tensor:
        parts = plane.split(tokens.seqlens)
        return torch.cat([parts[i] for i in images])

    seqlens = tuple(tokens.seqlens[i] for i in images)
    return Tokens(
        x=of(tokens.x), cu_seqlens=boundaries(seqlens, tokens.x.device)[0], seqlens=seqlens,
        grid=None if tokens.grid is None else tuple(tokens.grid[i] for i in images), pos=of(tokens.pos),
        size=None if tokens.size is None else of(tokens.size), planes=tuple(map(of, tokens.planes)),
    )  # fmt: skip


def _interleave(first: Tensor, second: Tensor, a: Sequence[int], b: Sequence[int], which: Sequence[bool]) -> Tensor:
    """Put segments of `first`, of lengths `a`, where `which` is true, and the next one of `second` elsewhere."""
    others = iter(second.split(list(b)))
    return torch.cat([own if here else next(others) for own, here in zip(first.split(list(a)), which, strict=True)])


def _joined(tokens: Tokens, part: Tokens, whole: Sequence[bool], budgets: tuple[int, ...]) -> Tokens:
    """Put the images that stay as they are back between those that were computed."""

    def with_whole(before: Tensor, after: Tensor) -> Tensor:
        return _interleave(before, after, tokens.seqlens, part.seqlens, whole)

    grid = None
    if tokens.grid is not None and part.grid is not None:
        others = iter(part.grid)
        grid = tuple(g if here else next(others) for g, here in zip(tokens.grid, whole, strict=True))
    planes = zip(tokens.planes[len(tokens.planes) - len(part.planes) :], part.planes, strict=True)
    return Tokens(
        x=with_whole(tokens.x, part.x), cu_seqlens=boundaries(budgets, part.x.device)[0], seqlens=budgets, grid=grid,
        pos=with_whole(tokens.pos, part.pos), size=with_whole(tokens.mass(), part.mass()),
        planes=tuple(with_whole(before, after) for before, after in planes),
    )  # fmt: skip


def _plan(tokens: Tokens, plan: Plan, whole: Sequence[bool], budgets: tuple[int, ...]) -> Plan:
    """Count what the computed images stand at from the start of all images."""
    rows = torch.arange(len(tokens.x), device=plan.keep.device)
    some = torch.cat([r for r, here in zip(rows.split(tokens.seqlens), whole, strict=True) if not here])
    kept = [k for k, here in zip(budgets, whole, strict=True) if not here]
    return Plan(keep=_interleave(rows, some.index_select(0, plan.keep), tokens.seqlens, kept, whole))
