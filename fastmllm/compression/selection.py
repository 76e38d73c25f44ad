"""Keep some tokens of every image and drop the others: the appliers of all compressors that select."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmllm.compression.tokens import Plan, Tokens, cumulative
from fastmllm.kernels.token_select import token_select


def select(tokens: Tokens, scores: Tensor, budgets: tuple[int, ...]) -> tuple[Tokens, Plan]:
    """Keep the best-scored tokens of every segment, with everything that belongs to them, in one operator.

    Args:
        tokens: of all images.
        scores: (T,); equal ones: the earlier token is kept.
        budgets: K of each segment.
    """
    sized = () if tokens.size is None else (tokens.size,)
    x, index, cu_seqlens, (pos, *rest) = token_select(
        tokens.x, tokens.cu_seqlens, scores.detach(), on_device(budgets, scores.device),
        (tokens.pos, *sized, *tokens.planes), total=sum(budgets), max_seqlen=tokens.longest,
    )  # fmt: skip
    size = rest.pop(0) if sized else None
    kept = Tokens(x=x, cu_seqlens=cu_seqlens, seqlens=budgets, grid=None, pos=pos, size=size, planes=tuple(rest))
    return kept, Plan(keep=index)


def best(tokens: Tokens, scores: Tensor, counts: tuple[int, ...], seqlens: tuple[int, ...] | None = None) -> Tensor:
    """Return the best-scored tokens of every segment in their order, (sum of counts,) int64; equal ones: the earlier.

    Args:
        tokens: of all images.
        scores: (T,).
        counts: tokens of each segment that are wanted, 0 to all.
        seqlens: of other segments than the images, e.g. frames.
    """
    scores = scores.detach()
    cu_seqlens = tokens.cu_seqlens if seqlens is None else cumulative(seqlens, scores.device)
    return token_select(
        scores,
        cu_seqlens,
        scores,
        on_device(counts, scores.device),
        total=sum(counts),
        max_seqlen=max(seqlens or tokens.seqlens),
    )[1]


def by_score(scores: Tensor, groups: Tensor) -> Tensor:
    """Return the order (K,) int64 that puts the highest score of each group first; equal ones: as they are."""
    order = scores.detach().argsort(descending=True, stable=True)
    return order.index_select(0, groups.index_select(0, order).argsort(stable=True))


def on_device(counts: tuple[int, ...], device: torch.device) -> int | Tensor:
    """Return one number where all are the same, else (S,) int32."""
    if len(set(counts)) == 1:
        return counts[0]
    return torch.tensor(counts, dtype=torch.int32).to(device, non_blocking=True)


def take(
    tokens: Tokens, index: Tensor, budgets: tuple[int, ...], x: Tensor | None = None, size: Tensor | None = None
) -> tuple[Tokens, Plan]:
    """Keep the tokens that an index names, with everything that belongs to them.

    Args:
        tokens: of all images.
        index: (K,) int64, segment after segment.
        budgets: how many of each.
        x: (K, C) what takes the place of their features, None: they stay.
        size: (K,) the same of their sizes.
    """

    def at(plane: Tensor) -> Tensor:
        return plane.index_select(0, index)

    if size is None and tokens.size is not None:
        size = at(tokens.size)
    kept = Tokens(
        x=at(tokens.x) if x is None else x, cu_seqlens=cumulative(budgets, tokens.x.device), seqlens=budgets,
        grid=None, pos=at(tokens.pos), size=size, planes=tuple(map(at, tokens.planes)),
    )  # fmt: skip
    return kept, Plan(keep=index)
