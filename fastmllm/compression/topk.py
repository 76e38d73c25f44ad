"""Keep the tokens with the highest scores, in their order.

FasterVLM (arXiv 2412.01818; scorer "cls_row"), FastV (arXiv 2403.06764; "last_row" in the language model), PyramidDrop
(arXiv 2410.17247; the same at several layers), and the baselines "random" and "grid".
"""

from __future__ import annotations

from dataclasses import replace

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Compressor, Evidence, Mode, Position
from fastmllm.compression.scorers import ATTENTIVE, SCORERS
from fastmllm.compression.selection import select
from fastmllm.compression.tokens import Plan, Tokens


class TopK(Compressor):
    """Keep the K best-scored tokens of every image.

    Args:
        keep: K, a fraction, or one K an image.
        scorer: a key of `SCORERS`.
        layer: whose attention is read, -1 the last one; for scorers by attention.
        seed: of the scorer "random".
        position: see `Compressor`.
        mode: "clean" only.
    """

    name = "topk"

    def __init__(
        self, keep: Budget, *, scorer: str = "cls_row", layer: int = -2, seed: int = 0, position: Position = "keep",
        mode: Mode = "clean",
    ) -> None:  # fmt: skip
        super().__init__(keep, position=position, mode=mode)
        if scorer not in SCORERS:
            raise ValueError(f"topk: unknown scorer {scorer!r}; known: {', '.join(SCORERS)}")
        self.scorer, self._layer, self.seed = scorer, layer, seed

    @property
    def layer(self) -> int | None:
        return self._layer if self.scorer in ATTENTIVE else None

    def reduce(self, tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> tuple[Tokens, Plan | None]:
        scores = SCORERS[self.scorer](tokens, replace(evidence, seed=self.seed), budgets)
        return select(tokens, scores, budgets)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scorer={self.scorer}, layer={self.layer}"
