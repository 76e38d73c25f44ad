"""Losses over the pairs of all ranks: which rank this is, and the rows of all of them with their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def place(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return this rank and how many there are; 0 of 1 where nothing is distributed."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Join the rows of all ranks; every rank brings equally many.

    Args:
        x: (n, ...) of this rank.
        group: of ranks; None is all of them.

    Returns:
        (ranks * n, ...), by rank. The gradient of a row is summed over the ranks that used it.
    """
    return x if place(group)[1] == 1 else _Gather.apply(x, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(place(group)[1])]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rank, ranks = place(ctx.group)
        grad = grads[0].contiguous().clone()  # not every backend reduces and scatters: all take the sum, and their rows
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ranks)[rank], None
