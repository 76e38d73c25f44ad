"""Keep a few pivots, and of the others those that resemble them or each other least.

DART (arXiv 2502.11494) and VisPruner (arXiv 2412.01818).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Compressor, Evidence, Mode, Position
from fastmllm.compression.ragged import Padding, units
from fastmllm.compression.scorers import ATTENTIVE, SCORERS
from fastmllm.compression.selection import select
from fastmllm.compression.tokens import Plan, Tokens

ROUND = 8  # tokens that VisPruner drops at once
Counts = tuple[int, ...]


class PivotDedup(Compressor):
    """Keep K tokens of every image: pivots, and what they do not duplicate; in the image's order.

    "norm" is DART: the pivots have the largest L1 norm; one after the other, largest first, each adds the same number
    of the tokens that are left and least like it, the first ones one more where K asks for it. The publication has
    pivots among the text too (0 here), takes them in the order of a hash, and adds up to more than K; K is exact here.
    Its faithful mode is the clean one.

    "score" is VisPruner: the pivots are the best by attention; the rest, best first, is thinned in rounds: each token
    at an even place looks for the most similar one at an odd place, and those with the closest ones go. The faithful
    mode drops 8 a round, about (N - K) / 8 rounds; the clean one a quarter of the rest if that is more.

    Args:
        keep: K, a fraction, or one K an image.
        pivots: "norm" or "score".
        share: pivots of K: a number (K where that is less), or a fraction of K, rounded down. None: DART's 8 (half of
            which it takes from the text), or VisPruner's 0.5.
        states: what the norm is of: "keys", those of a layer's attention as DART has it inside of a language model, or
            "features", which needs none.
        scorer: of the "score"; "cls_row", or "received" for towers without a class token.
        layer: whose attention or keys are read, -1 the last one.
        position: see `Compressor`.
        mode: "clean" or "faithful".

    Raises:
        ValueError: an option that there is not, or a share out of range.
    """

    name = "pivot_dedup"
    faithful_to = "DART (arXiv 2502.11494) by norm, VisPruner (arXiv 2412.01818) by score"

    def __init__(
        self, keep: Budget, *, pivots: Literal["norm", "score"] = "norm", share: int | float | None = None,
        states: Literal["keys", "features"] = "keys", scorer: str = "cls_row", layer: int = -2,
        position: Position = "keep", mode: Mode = "clean",
    ) -> None:  # fmt: skip
        super().__init__(keep, position=position, mode=mode)
        if pivots not in ("norm", "score"):
            raise ValueError(f"pivot_dedup: pivots {pivots!r} is not one of norm, score")
        if states not in ("keys", "features"):
            raise ValueError(f"pivot_dedup: states {states!r} is not one of keys, features")
        if scorer not in SCORERS:
            raise ValueError(f"pivot_dedup: unknown scorer {scorer!r}; known: {', '.join(SCORERS)}")
        if share is None:
            share = 8 if pivots == "norm" else 0.5
        if share < 0 or (isinstance(share, float) and share > 1) or (pivots == "norm" and not share):
            raise ValueError(f"pivot_dedup: share {share} must be a number of pivots or a fraction in 0..1")
        self.pivots, self.share, self.states, self.scorer, self._layer = pivots, share, states, scorer, layer

    @property
    def layer(self) -> int | None:
        reads = self.states == "keys" if self.pivots == "norm" else self.scorer in ATTENTIVE
        return self._layer if reads else None

    def reduce(self, tokens: Tokens, evidence: Evidence, budgets: Counts) -> tuple[Tokens, Plan]:
        if self.pivots == "score":
            scores = SCORERS[self.scorer](tokens, evidence, budgets)
        elif self.states == "features":
            scores = tokens.x.detach().float().norm(p=1, dim=1)
        else:
            scores = self._probe(evidence).key_norms()
        padding = Padding(tokens.seqlens, scores.device)
        ranked = padding.mask(padding.pad(scores.nan_to_num(torch.finfo(scores.dtype).min)), -torch.inf)
        order = ranked.argsort(dim=1, descending=True, stable=True)  # (S, N) places, best first
        unit = padding.pad(units(tokens.x))
        pivots = tuple(map(self._pivots, budgets))
        if self.pivots == "norm":
            chosen = _unlike(padding, unit, order, pivots, budgets)
        else:
            whole = [k == n for k, n in zip(budgets, tokens.seqlens, strict=True)]
            pivots = tuple(k if w else p for p, k, w in zip(pivots, budgets, whole, strict=True))
            chosen = self._thinned(padding, unit, order, tokens.seqlens, pivots, budgets)
        return select(tokens, padding.unpad(chosen), budgets)

    def _pivots(self, keep: int) -> int:
        pivots = int(self.share * keep) if isinstance(self.share, float) else min(self.share, keep)
        return max(1, pivots) if self.pivots == "norm" else pivots

    def _thinned(
        self, padding: Padding, unit: Tensor, order: Tensor, seqlens: Counts, pivots: Counts, budgets: Counts
    ) -> Tensor:
        """Return (S, N) fp32, 1 for the first of each order and for what is left of the others after all rounds."""
        device, width = order.device, padding.width
        wanted = [k - p for k, p in zip(budgets, pivots, strict=True)]
        live = [n - p if w else 0 for n, p, w in zip(seqlens, pivots, wanted, strict=True)]
        firsts = _places(order, [0] * len(live), pivots, max(pivots))
        rest = _places(order, pivots, live, max(live))
        # one token more, like none, stands for those that are absent
        cosine = F.pad(unit @ unit.transpose(1, 2), (0, 1, 0, 1), value=-torch.inf)
        image = torch.arange(len(live), device=device)[:, None, None]
        while live != wanted:
            drop = [self._dropped(r, w) for r, w in zip(live, wanted, strict=True)]
            even, odd = rest[:, ::2], rest[:, 1::2]
            nearest = cosine[image, even[:, :, None], odd[:, None]].amax(2)
            even = even.gather(1, nearest.argsort(dim=1, descending=True, stable=True))
            left = [(r + 1) // 2 - d for r, d in zip(live, drop, strict=True)]
            if len(set(live)) == len(set(drop)) == 1:
                rest = torch.cat((even[:, drop[0] :], odd), 1)
            else:
                rest = _compact(even, odd, drop, left, [r // 2 for r in live], width)
            live = [r - d for r, d in zip(live, drop, strict=True)]
        chosen = torch.zeros((len(live), width + 1), device=device).scatter_(1, firsts, 1.0)
        return chosen.scatter_(1, rest, 1.0)[:, :width]

    def _dropped(self, live: int, wanted: int) -> int:
        once = ROUND if self.mode == "faithful" else max(ROUND, live // 4)
        return min(once, live - wanted, (live + 1) // 2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pivots={self.pivots}, share={self.share}, layer={self.layer}"


def _unlike(padding: Padding, unit: Tensor, order: Tensor, pivots: Counts, budgets: Counts) -> Tensor:
    """Return (S, N) fp32, 1 for the first of each order, and for those that are least like each of them in turn."""
    width, most, device = order.shape[1], max(pivots), order.device
    shares = [divmod(k - p, p) for k, p in zip(budgets, pivots, strict=True)]
    firsts = order[:, :most]
    cosine = unit.gather(1, firsts[:, :, None].expand(-1, -1, unit.shape[2])) @ unit.transpose(1, 2)  # (S, P, N)
    chosen = torch.zeros((len(order), width + 1), device=device)
    chosen.scatter_(1, _places(order, [0] * len(pivots), pivots, most), 1.0)
    for step in range(most):
        quotas = [(each + (step < more)) * (step < p) for (each, more), p in zip(shares, pivots, strict=True)]
        free = padding.mask(cosine[:, step].masked_fill(chosen[:, :width] > 0, torch.inf), torch.inf)
        unlike = free.argsort(dim=1, stable=True)
        chosen.scatter_(1, _places(unlike, [0] * len(pivots), quotas, max(quotas)), 1.0)
    return chosen[:, :width]


def _places(order: Tensor, start: Sequence[int], count: Sequence[int], most: int) -> Tensor:
    """Return (S, most) of each row the places from start on, `count` of them; N stands for those that are none."""
    width, device = order.shape[1], order.device
    if len(set(start)) == len(set(count)) == 1:
        return order[:, start[0] : start[0] + most]
    place = torch.arange(most)
    index = torch.where(place < torch.tensor(count)[:, None], place + torch.tensor(start)[:, None], width)
    return F.pad(order, (0, 1), value=width).gather(1, index.to(device, non_blocking=True))


def _compact(even: Tensor, odd: Tensor, skip: list[int], evens: list[int], odds: list[int], none: int) -> Tensor:
    """Return of each row the evens behind `skip` and the odds, without gaps; `none` stands behind them."""
    place = torch.arange(max(a + b for a, b in zip(evens, odds, strict=True)))
    first, a, b = (torch.tensor(n)[:, None] for n in (skip, evens, odds))
    width = even.shape[1]
    index = torch.where(place < a, place + first, place - a + width)
    index = torch.where(place < a + b, index, width + odd.shape[1])
    both = F.pad(torch.cat((even, odd), 1), (0, 1), value=none)
    return both.gather(1, index.to(even.device, non_blocking=True))
