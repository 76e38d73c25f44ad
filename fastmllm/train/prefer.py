"""A stage that learns from preferences: DPO with mDPO's image term and anchor, around any model with `log_probs`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fastmllm.data.preference import PairBatch
from fastmllm.train.losses import anchor_loss, dpo_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferConfig:
    """Weigh the three terms of a preference stage; the defaults are mDPO's (arXiv 2406.11839).

    Args:
        beta: how strongly the reference holds.
        image: weight of the conditional term, which prefers the image to its crop; 0 leaves crops out.
        anchor: weight of the term that holds the chosen answer's reward above `anchor_reward`.
        anchor_reward: mDPO's delta.
    """

    beta: float = 0.1
    image: float = 1.0
    anchor: float = 1.0
    anchor_reward: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"prefer: beta ({self.beta}) must be positive; 0.1 is usual")
        if not (0 <= self.image < math.inf and 0 <= self.anchor < math.inf and math.isfinite(self.anchor_reward)):
            raise ValueError(
                f"prefer: image ({self.image}) and anchor ({self.anchor}) must be weights of 0 or more, anchor_reward "
                f"({self.anchor_reward}) finite"
            )


class Scorer(Protocol):
    """A model that tells how probable it finds the answers of a packed batch (`VLM`)."""

    def log_probs(self, batch: Any) -> Tensor:
        """Return (S,) fp32."""
        ...


class PreferenceObjective(nn.Module):
    """A model whose forward is the loss of a batch of pairs.

    Args:
        model: `log_probs(batch)` gives (S,) log-probabilities of the sequences' answers.
        config: weights of the terms.
    """

    def __init__(self, model: nn.Module, config: PreferConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self._sums: list[Tensor] = []  # of the micro-batches since they were taken

    @property
    def scorer(self) -> Scorer:
        """The model, as what is asked of it."""
        return cast(Scorer, self.model)

    def forward(self, pairs: PairBatch) -> Tensor:
        """Return the loss summed over pairs; a pair without a corrupted image has no image term."""
        policy = self.scorer.log_probs(pairs.batch)
        reference = pairs.reference.to(policy)
        config, chosen, rejected = self.config, pairs.chosen, pairs.rejected
        loss = dpo_loss(policy[chosen], policy[rejected], reference[chosen], reference[rejected], config.beta).sum()
        if config.image and len(pairs.corrupted):
            shown, other = chosen[pairs.corrupted_pair], pairs.corrupted
            sight = dpo_loss(policy[shown], policy[other], reference[shown], reference[other], config.beta)
            loss = loss + config.image * sight.sum()
        if config.anchor:
            held = anchor_loss(policy[chosen], reference[chosen], config.beta, config.anchor_reward)
            loss = loss + config.anchor * held.sum()
        if self.training and torch.is_grad_enabled():
            self._sums.append(_figures(config.beta * (policy.detach() - reference), chosen, rejected))
        return loss

    def take_figures(self) -> dict[str, float]:
        """Return sums over the pairs since the last call, for the log: each answer's reward, and pairs in order."""
        sums = torch.stack(self._sums).sum(0).tolist() if self._sums else [0.0, 0.0, 0.0]
        self._sums = []
        return dict(zip(("reward_chosen", "reward_rejected", "accuracy"), sums, strict=True))


def _figures(reward: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return (3,): rewards of chosen and of rejected answers, and in how many pairs the chosen one's is larger."""
    better, worse = reward[chosen], reward[rejected]
    return torch.stack([better.sum(), worse.sum(), (better > worse).to(reward).sum()])


@torch.no_grad()
def rewards(model: Scorer, pairs: PairBatch, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rewards beta * (policy - reference) of a batch: chosen (P,), rejected (P,), corrupted (C,)."""
    policy = model.log_probs(pairs.batch)
    reward = beta * (policy - pairs.reference.to(policy))
    return reward[pairs.chosen], reward[pairs.rejected], reward[pairs.corrupted]
