"""Keep tokens that differ from each other, picked one after the other.

DivPrune (arXiv 2503.02175; "max_min"), CDPruner (arXiv 2506.10967; "dpp" with relevance), SCOPE (arXiv 2510.24214;
"coverage") and the visual half of MMTok (arXiv 2508.18264), residual energy as of ResPrune (arXiv 2603.21105;
"residual").
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Compressor, Evidence, Mode, Position
from fastmllm.compression.scorers import ATTENTIVE, SCORERS
from fastmllm.compression.selection import on_device, take
from fastmllm.compression.tokens import Plan, Tokens
from fastmllm.kernels.greedy_diverse import greedy_diverse

Objective = Literal["max_min", "dpp", "coverage", "residual"]
PUBLISHED = ("max_min", "dpp")  # whose released code the faithful mode follows


class GreedyDiverse(Compressor):
    """Keep K tokens of every image, each picked as the one that adds most to those before it; in their order.

    The formulas stand in `fastmllm.kernels.greedy_diverse`. For "max_min" the faithful mode is the clean one. For "dpp"
    relevance is scaled to 0..1 within the image first; the faithful mode adds CDPruner's 1e-6 to the numerator, so that
    the least relevant token counts a little, and is infinite where all are equally relevant; the clean one is 1 there.
    CDPruner's code scales over all tiles of an image together and takes the negated cosine of patch and text in CLIP's
    space: a segment here is a tile, and the sign is up to whoever gives the relevance.

    Args:
        keep: K, a fraction, or one K an image.
        objective: what the next token must have most of: "max_min" distance to the picked ones, "dpp" the determinant
            of the similarities, "coverage" of all tokens, "residual" energy outside of the span of the picked ones.
        relevance: weighs the tokens: "given" `Evidence.relevance`, or a key of `SCORERS`; "cls_row" is SCOPE's. None:
            one each. Not for "max_min". At least 0 for "coverage" and "residual".
        layer: whose attention is read, -1 the last one; for a relevance by attention.
        position: see `Compressor`.
        mode: "clean", or "faithful" for "max_min" and "dpp".

    Raises:
        ValueError: an objective or relevance that there is not, or the two do not go together.
    """

    name = "greedy_diverse"
    faithful_to = "DivPrune (arXiv 2503.02175) by max_min, CDPruner (arXiv 2506.10967) by dpp"

    def __init__(
        self, keep: Budget, *, objective: Objective = "max_min", relevance: str | None = None, layer: int = -2,
        position: Position = "keep", mode: Mode = "clean",
    ) -> None:  # fmt: skip
        super().__init__(keep, position=position, mode=mode)
        if objective not in get_args(Objective):
            raise ValueError(f"greedy_diverse: objective {objective!r} is not one of {', '.join(get_args(Objective))}")
        if relevance not in (None, "given", *SCORERS):
            raise ValueError(f"greedy_diverse: relevance {relevance!r} is not one of given, {', '.join(SCORERS)}")
        if relevance is not None and objective == "max_min":
            raise ValueError("greedy_diverse: max_min takes no relevance; dpp, coverage and residual do")
        if mode == "faithful" and objective not in PUBLISHED:
            raise ValueError(f"greedy_diverse: mode 'faithful' is for {', '.join(PUBLISHED)}, not for {objective}")
        self.objective, self.relevance, self._layer = objective, relevance, layer

    @property
    def layer(self) -> int | None:
        return self._layer if self.relevance in ATTENTIVE else None

    def reduce(self, tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> tuple[Tokens, Plan]:
        relevance = self._relevance(tokens, evidence, budgets)
        index, _ = greedy_diverse(
            tokens.x, tokens.cu_seqlens, on_device(budgets, tokens.x.device), self.objective, relevance,
            total=sum(budgets), max_seqlen=tokens.longest,
        )  # fmt: skip
        return take(tokens, index, budgets)

    def _relevance(self, tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> Tensor | None:
        if self.relevance is None:
            return None
        if self.relevance != "given":
            relevance = SCORERS[self.relevance](tokens, evidence, budgets)
        elif evidence.relevance is None or evidence.relevance.shape != tokens.x.shape[:1]:
            raise ValueError(f"greedy_diverse: needs Evidence(relevance=...) of shape ({len(tokens.x)},)")
        else:
            relevance = evidence.relevance.detach()
        return self._scaled(tokens, relevance) if self.objective == "dpp" else relevance

    def _scaled(self, tokens: Tokens, relevance: Tensor) -> Tensor:
        """Return the relevance within each image's own range."""
        owners = tokens.owners()
        bounds = relevance.new_full((2, len(tokens.seqlens)), torch.inf)  # of r and of -r
        both = torch.stack((relevance, -relevance))
        bounds = bounds.scatter_reduce(1, owners.expand(2, -1), both, "amin").index_select(1, owners)
        least, spread = bounds[0], -bounds[1] - bounds[0]
        if self.mode == "faithful":
            return (relevance - least + 1e-6) / spread
        return torch.where(spread > 0, (relevance - least) / spread, 1.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, objective={self.objective}, relevance={self.relevance}, layer={self.layer}"
