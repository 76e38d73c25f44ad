"""Keep the tokens that attention dwells on, and let some of the others gather the rest.

VisionZip (arXiv 2412.04467), LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Compressor, Evidence, Mode, Position, Probe
from fastmllm.compression.prumerge import prumerge, with_neighbours
from fastmllm.compression.ragged import Padding, interleaved, pooled, sets, units
from fastmllm.compression.scorers import SCORERS
from fastmllm.compression.selection import best, take
from fastmllm.compression.tokens import Plan, Tokens

Counts = tuple[int, ...]


class DominantContextual(Compressor):
    """Keep dominant tokens by attention and, of the others, contextual ones at even steps; merge what is left.

    `merge` says into what. "nearest" is VisionZip: each token that is left goes to the contextual one whose key, the
    mean over heads, is nearest by cosine. The clean mode takes the mean of all that a contextual token stands for, and
    keeps the image's order; the faithful one adds the mean of the others to the contextual token, which so grows up to
    twice as long, and puts it behind the dominant ones. VisionZip's 54 + 10 tokens do not count the class token, which
    it keeps beside them: it is none of the tokens here.

    "neighbours" is PruMerge: each kept token takes in the 32 others with the nearest keys, shared among kept tokens and
    weighted by attention. The clean mode takes the weighted mean, by the model's own attention; contextual tokens make
    it PruMerge+. The faithful one adds the weighted sum without a norm, by an attention of its own (softmax of the
    class token's q k / sqrt(C) as one head of full width; `layer` -1 in the publication), orders by it, and ends with
    one token more: the weighted sum of all that were not kept, at the position of the last of those. K counts that
    one. What the published code draws from the data or the batch, K itself, is the budget here, in both modes.

    Args:
        keep: K, a fraction, or one K an image.
        contextual: tokens of K that are contextual, or their fraction (at least 1); VisionZip has 5 of 32. 0 for
            PruMerge.
        merge: "nearest" or "neighbours".
        scorer: "cls_row", or "received" for towers without a class token.
        layer: whose attention and keys are read, -1 the last one.
        position: see `Compressor`; a merged token stands where its dominant or contextual one does.
        mode: "clean" or "faithful"; faithful "neighbours" takes contextual=0 and scorer="cls_row".

    Raises:
        ValueError: an option out of range, or more contextual tokens than an image keeps.
    """

    name = "dominant_contextual"
    faithful_to = "VisionZip (arXiv 2412.04467) by nearest, PruMerge (arXiv 2403.15388) by neighbours"

    def __init__(
        self, keep: Budget, *, contextual: int | float = 5 / 32, merge: Literal["nearest", "neighbours"] = "nearest",
        scorer: Literal["cls_row", "received"] = "cls_row", layer: int = -2, position: Position = "keep",
        mode: Mode = "clean",
    ) -> None:  # fmt: skip
        super().__init__(keep, position=position, mode=mode)
        if merge not in ("nearest", "neighbours"):
            raise ValueError(f"dominant_contextual: merge {merge!r} is not one of nearest, neighbours")
        if scorer not in ("cls_row", "received"):
            raise ValueError(f"dominant_contextual: scorer {scorer!r} is not one of cls_row, received")
        fits = 0 < contextual <= 1 if isinstance(contextual, float) else contextual >= (merge == "nearest")
        if not fits:
            raise ValueError(
                f"dominant_contextual: contextual {contextual} must be a number of tokens, at least 1 for nearest, or "
                "a fraction in 0..1, above 0"
            )
        if mode == "faithful" and merge == "neighbours" and (contextual or scorer != "cls_row"):
            raise ValueError("dominant_contextual: faithful neighbours are of contextual=0 and scorer='cls_row'")
        self.contextual, self.merge, self.scorer, self._layer = contextual, merge, scorer, layer

    @property
    def layer(self) -> int | None:
        return self._layer

    def reduce(self, tokens: Tokens, evidence: Evidence, budgets: Counts) -> tuple[Tokens, Plan]:
        probe = self._probe(evidence)
        contextual = tuple(self._contextual(k, n) for k, n in zip(budgets, tokens.seqlens, strict=True))
        if self.merge == "neighbours" and self.mode == "faithful":
            return prumerge(tokens, probe, budgets)
        scores = SCORERS[self.scorer](tokens, evidence, budgets)
        dominant = tuple(k - c for k, c in zip(budgets, contextual, strict=True))
        first, targets = _anchors(tokens, scores, dominant, contextual)
        keep = torch.cat((first, targets))
        if self.merge == "neighbours":
            return with_neighbours(tokens, probe, scores, keep.sort().values, budgets)
        added = self.mode == "faithful"
        keep = keep.index_select(0, interleaved(dominant, contextual, keep.device)) if added else keep.sort().values
        return _nearest(tokens, probe, keep, targets, budgets, contextual, added)

    def _contextual(self, keep: int, tokens: int) -> int:
        if keep == tokens:
            return 0
        if isinstance(self.contextual, float):
            return max(1, int(self.contextual * keep + 0.5))
        if self.contextual > keep:
            raise ValueError(f"dominant_contextual: {self.contextual} contextual tokens are more than keep {keep}")
        return self.contextual

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, contextual={self.contextual}, merge={self.merge}, scorer={self.scorer}, "
            f"layer={self.layer}"
        )


def _anchors(tokens: Tokens, scores: Tensor, dominant: Counts, contextual: Counts) -> tuple[Tensor, Tensor]:
    """Return the dominant tokens, and those at even steps among the others."""
    first = best(tokens, scores, dominant)
    others = tuple(n - d for n, d in zip(tokens.seqlens, dominant, strict=True))
    rest = best(tokens, torch.ones_like(scores).index_fill(0, first, 0.0), others)
    starts = torch.tensor([0, *others]).cumsum(0).tolist()
    even = [
        torch.arange(c) * max(1, n // max(1, c)) + start
        for n, c, start in zip(others, contextual, starts, strict=False)
    ]
    return first, rest.index_select(0, torch.cat(even).to(rest.device, non_blocking=True))


def _nearest(
    tokens: Tokens, probe: Probe, keep: Tensor, targets: Tensor, budgets: Counts, contextual: Counts, added: bool
) -> tuple[Tokens, Plan]:
    """Merge each token that is not kept into the target with the nearest key; `added`: their mean on top of it."""
    every, chosen, rows = Padding(tokens.seqlens, keep.device), Padding(contextual, keep.device), len(keep)
    row = keep.new_full((len(tokens.x),), -1).index_copy(0, keep, torch.arange(rows, device=keep.device))
    keys = probe.keys()
    unit = units(keys.index_select(0, targets))
    cosine = every.pad(keys).to(unit.dtype) @ chosen.pad(unit).transpose(1, 2)  # but for each token's own length
    nearest = chosen.mask(cosine, -torch.inf).argmax(2)  # (S, N)
    to = every.unpad(chosen.pad(row.index_select(0, targets)).gather(1, nearest))
    kept = row >= 0
    assign = torch.where(kept, row, to)
    plan = Plan(keep=keep, assign=assign)
    if added:
        index, starts = sets(to.masked_fill(kept, rows), rows + 1)  # the last set has those that are kept
        merged = tokens.x.index_select(0, keep) + pooled(tokens.x, index, starts)[:rows]
        size = _sizes(tokens, index, starts)[:rows] + (1 if tokens.size is None else tokens.size.index_select(0, keep))
        return take(tokens, keep, budgets, merged, size)[0], plan
    index, starts = sets(assign, rows)
    size = _sizes(tokens, index, starts)
    weight = None
    if tokens.size is not None:
        weight = tokens.size.index_select(0, index) / size.index_select(0, assign.index_select(0, index))
    return take(tokens, keep, budgets, pooled(tokens.x, index, starts, weight), size)[0], plan


def _sizes(tokens: Tokens, index: Tensor, starts: Tensor) -> Tensor:
    """Return (K,) fp32 how many tokens of the grid each set stands for."""
    if tokens.size is None:
        return starts.diff().float()
    return pooled(tokens.size[:, None], index, starts, torch.ones_like(tokens.size))[:, 0]
