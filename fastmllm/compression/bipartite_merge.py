"""Merge the most similar tokens, round by round (Token Merging, Bolya et al., arXiv 2210.09461)."""

from __future__ import annotations

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
        x, size, cu_seqlens, seqlens = tokens.x, tokens.size, tokens.cu_seqlens, tokens.seqlens
        metric = x if self.metric == "features" else self._probe(evidence).keys()
        keep = assign = torch.arange(len(x), device=x.device)
        while seqlens != budgets:
            merges = [min(n - k, n // 2) for n, k in zip(seqlens, budgets, strict=True)]
            before = seqlens
            merged = token_merge(x, metric, size, merges, cu_seqlens=cu_seqlens, max_seqlen=max(before))
            x, size, cu_seqlens = merged.tokens, merged.size, merged.cu_seqlens
            seqlens = tuple(n - r for n, r in zip(before, merges, strict=True))
            standing = _standing(before, merged.destination, sum(seqlens))
            assign, keep = merged.destination.index_select(0, assign), keep.index_select(0, standing)
            metric = x if self.metric == "features" else metric.index_select(0, standing)
        out = Tokens(
            x=x, cu_seqlens=cu_seqlens, seqlens=seqlens, grid=None, pos=tokens.pos.index_select(0, keep), size=size,
            planes=tuple(plane.index_select(0, keep) for plane in tokens.planes),
        )  # fmt: skip
        return out, Plan(keep=keep, assign=assign)


def _standing(seqlens: tuple[int, ...], destination: Tensor, total: int) -> Tensor:
    """Return (K,) the token that each row of a round's result stands at: its odd member, or the even one left alone."""
    index = boundaries(seqlens, destination.device)[1]
    rows = torch.arange(len(destination), device=destination.device)
    standing = destination.new_full((total + 1,), -1)  # the last row takes what is not meant
    for odd in (0, 1):
        standing.scatter_(0, torch.where(index % 2 == odd, destination, total), rows)
    return standing[:-1]
