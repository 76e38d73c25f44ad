"""Keep some tokens of every image and drop the others: the appliers of all compressors that select."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmllm.compression.tokens import Plan, Tokens, boundaries
from fastmllm.kernels.token_select import token_select


def select(tokens: Tokens, scores: Tensor, budgets: tuple[int, ...]) -> tuple[Tokens, Plan]:
    """Keep the best-scored tokens of every segment, with everything that belongs to them, in one operator.

    Args:
        tokens: of all images.
        scores: (T,); equal ones: the earlier token is kept.
        budgets: K of each segment.
    """
    same = len(set(budgets)) == 1
    keep = budgets[0] if same else torch.tensor(budgets, dtype=torch.int32).to(tokens.x.device, non_blocking=True)
    sized = () if tokens.size is None else (tokens.size,)
    x, index, cu_seqlens, (pos, *rest) = token_select(
        tokens.x, tokens.cu_seqlens, scores.detach(), keep, (tokens.pos, *sized, *tokens.planes),
        total=sum(budgets), max_seqlen=tokens.longest,
    )  # fmt: skip
    size = rest.pop(0) if sized else None
    kept = Tokens(x=x, cu_seqlens=cu_seqlens, seqlens=budgets, grid=None, pos=pos, size=size, planes=tuple(rest))
    return kept, Plan(keep=index)


def take(tokens: Tokens, index: Tensor, budgets: tuple[int, ...]) -> tuple[Tokens, Plan]:
    """Keep the tokens that an index names, (K,) int64, segment after segment, with everything that belongs to them."""

    def at(plane: Tensor) -> Tensor:
        return plane.index_select(0, index)

    kept = Tokens(
        x=at(tokens.x), cu_seqlens=boundaries(budgets, tokens.x.device)[0], seqlens=budgets, grid=None,
        pos=at(tokens.pos), size=None if tokens.size is None else at(tokens.size), planes=tuple(map(at, tokens.planes)),
    )  # fmt: skip
    return kept, Plan(keep=index)
