"""Merge the most similar tokens, round by round (Token Merging, Bolya et al., arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Compressor, Evidence, Mode, Position
from fastmllm.compression.tokens import Plan, Tokens, boundaries
from fastmllm.kernels.token_merge import token_merge


class BipartiteMerge(Compressor):
    """Merge by bipartite soft matching until K tokens are left; each is the mean of what it stands for.

    A round merges at most half of an image's tokens. The order is kept; a merged pair stands at its odd member's place.

    Args:
        keep: K, a fraction, or one K an image.
        metric: what similarity is measured on: "features", the tokens themselves, or "keys", those of a layer's
            attention, the mean over heads, as Token Merging has it inside of an encoder.
        layer: whose keys, -1 the last one.
        position: see `Compressor`.
        mode: "clean" only: the algorithm has no other.
    """

    name = "bipartite_merge"

    def __init__(
        self, keep: Budget, *, metric: Literal["features", "keys"] = "features", layer: int = -1,
        position: Position = "keep", mode: Mode = "clean",
    ) -> None:  # fmt: skip
        super().__init__(keep, position=position, mode=mode)
        if metric not in ("features", "keys"):
            raise ValueError(f"bipartite_merge: metric {metric!r} is not one of features, keys")
        self.metric, self._layer = metric, layer

    @property
    def layer(self) -> int | None:
        return self._layer if self.metric == "keys" else None

    def reduce(self, tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> tuple[Tokens, Plan]:
        x, merger = tokens.x, Merger(tokens.seqlens, tokens.cu_seqlens, tokens.size)
        metric = x if self.metric == "features" else self._probe(evidence).keys()
        while merger.seqlens != budgets:
            merges = [min(n - k, n // 2) for n, k in zip(merger.seqlens, budgets, strict=True)]
            x = merger.merge(x, metric if self.metric == "keys" else x, merges)
            metric = metric if self.metric == "features" else metric.index_select(0, merger.standing)
        return merger.tokens(x, tokens.pos, tokens.planes), merger.plan()


class Merger:
    """Tokens that are merged in rounds: how many are left, what each stands for, and where each went.

    Args:
        seqlens: tokens of each image, host.
        cu_seqlens: (S + 1,) int32 their boundaries.
        size: (T,) fp32 what each stands for already; None: one each.
        protected: tokens at the start of every image that neither merge nor are merged into.
    """

    def __init__(
        self, seqlens: tuple[int, ...], cu_seqlens: Tensor, size: Tensor | None = None, protected: int = 0
    ) -> None:
        self.seqlens, self.cu_seqlens, self.size, self.protected = seqlens, cu_seqlens, size, protected
        self.log_size = None if size is None else size.log()
        rows = torch.arange(sum(seqlens), device=cu_seqlens.device)
        self.keep, self.assign, self.standing = rows, rows, rows

    def merge(self, x: Tensor, metric: Tensor, merges: Sequence[int]) -> Tensor:
        """Merge the most similar pairs of each image: (T, D) -> (T', D)."""
        longest = max(self.seqlens)
        merged = token_merge(
            x, metric, self.size, merges, cu_seqlens=self.cu_seqlens, max_seqlen=longest, protected=self.protected
        )
        before = self.seqlens
        self.seqlens = tuple(n - r for n, r in zip(before, merges, strict=True))
        self.size, self.log_size = merged.size.detach(), merged.log_size.detach()
        self.cu_seqlens = merged.cu_seqlens
        self.standing = _standing(before, merged.destination, sum(self.seqlens))
        self.assign = merged.destination.index_select(0, self.assign)
        self.keep = self.keep.index_select(0, self.standing)
        return merged.tokens

    def tokens(self, x: Tensor, pos: Tensor, planes: Sequence[Tensor] = ()) -> Tokens:
        """Wrap what is left; positions and side planes are those of the token that each stands at."""
        return Tokens(
            x=x, cu_seqlens=self.cu_seqlens, seqlens=self.seqlens, grid=None, pos=pos.index_select(0, self.keep),
            size=self.size, planes=tuple(plane.index_select(0, self.keep) for plane in planes),
        )  # fmt: skip

    def plan(self) -> Plan:
        """Return where every token went."""
        return Plan(keep=self.keep, assign=self.assign)


def _standing(seqlens: tuple[int, ...], destination: Tensor, total: int) -> Tensor:
    """Return (K,) the token that each row of a round's result stands at: its odd member, or the even one left alone."""
    index = boundaries(seqlens, torch.device("cpu"))[1]
    key = index % 2 * len(index) + torch.arange(len(index))  # an odd member goes before all even ones
    key = key.to(destination.device, non_blocking=True)
    return destination.new_zeros(total).scatter_reduce(0, destination, key, "amax") % len(index)
