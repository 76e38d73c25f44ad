"""A stage that learns from verifiable answers: sample a group of them a prompt, reward each, raise the better ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fastmllm.data.packing import Batch
from fastmllm.data.sample import Sample
from fastmllm.train.losses import grpo_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOConfig:
    """Say how a stage samples and what it learns from it.

    Answers are drawn at temperature 1: the ratio of the loss is that of the model's own probabilities.

    Args:
        group: G, answers to a prompt; `batch_size` of the stage counts prompts.
        max_new_tokens: longest answer. An answer's loss is the sum over its tokens divided by this constant, as in Dr.
            GRPO (arXiv 2503.20783), not by its own length.
        clip: half width of the ratio's interval around 1.
        kl: weight of the divergence from the model that the stage starts from; 0 spares a pass (and a copy of what
            learns).
        standardise: divide advantages by the standard deviation of their group (arXiv 2402.03300).
        inner: optimizer steps on the same answers.
    """

    group: int = 8
    max_new_tokens: int = 16
    clip: float = 0.2
    kl: float = 0.04
    standardise: bool = False
    inner: int = 1

    def __post_init__(self) -> None:
        if self.group < 2 or self.max_new_tokens < 1 or self.inner < 1:
            raise ValueError(
                f"grpo: group ({self.group}) must be at least 2, max_new_tokens ({self.max_new_tokens}) and inner "
                f"({self.inner}) at least 1"
            )
        if not (0 < self.clip < 1 and 0 <= self.kl < math.inf):
            raise ValueError(f"grpo: clip ({self.clip}) must lie between 0 and 1, kl ({self.kl}) not be negative")


@dataclass(slots=True)
class Prompts:
    """A micro-batch of questions, each `group` times under names of its own.

    Args:
        batch: prompts without answers; each image once.
        samples: what is asked, and what is right.
    """

    batch: Batch
    samples: list[Sample]
    num_targets: int = 0

    @property
    def input_ids(self) -> Tensor:
        """(T,) of the prompts."""
        return self.batch.input_ids

    @property
    def ids(self) -> list[str]:
        """Names of the answers to come."""
        return self.batch.ids


@dataclass(slots=True)
class Answers:
    """S sampled answers, with n tokens that are scored.

    Args:
        batch: prompts and answers.
        advantages: (n,) fp32, of the answer that a token belongs to.
        old: (n,) fp32 log-probabilities when they were sampled; None: now.
        reference: (n,) fp32 under the reference, or None.
    """

    batch: Batch
    advantages: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None

    @property
    def input_ids(self) -> Tensor:
        """(T,) of prompts and answers."""
        return self.batch.input_ids

    @property
    def num_targets(self) -> int:
        """S: a step's loss is the mean over its answers."""
        return len(self.batch.ids)

    @property
    def ids(self) -> list[str]:
        """Names of the answers."""
        return self.batch.ids


class TokenScorer(Protocol):
    """A model that tells how probable it finds each scored token of a packed batch (`VLM`)."""

    def target_log_probs(self, batch: Any) -> Tensor:
        """Return (n,) fp32."""
        ...


class GRPOObjective(nn.Module):
    """A model whose forward is the loss of a batch of sampled answers.

    Args:
        model: `target_log_probs(batch)` gives (n,) log-probabilities of the scored tokens.
        config: clip and divergence.
    """

    def __init__(self, model: nn.Module, config: GRPOConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, answers: Answers) -> Tensor:
        """Return the loss summed over answers."""
        policy = cast(TokenScorer, self.model).target_log_probs(answers.batch)
        old = policy.detach() if answers.old is None else answers.old.to(policy)
        reference = None if answers.reference is None else answers.reference.to(policy)
        advantages, every = answers.advantages.to(policy), torch.ones_like(policy, dtype=torch.bool)
        loss = grpo_loss(policy, old, reference, advantages, every, self.config.clip, self.config.kl)
        return loss.sum() / self.config.max_new_tokens
