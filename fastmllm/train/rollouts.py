"""Sampled answers, their rewards and advantages, made between steps with the weights of the moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmllm.data.packing import Batch
from fastmllm.data.sample import Sample
from fastmllm.train.grpo import Answers, GRPOConfig, Prompts, TokenScorer
from fastmllm.train.losses import group_advantages
from fastmllm.train.stages import set_modes


class Rollouts:
    """Turn prompts into answers with the weights of the moment, and keep them for `inner` steps.

    Args:
        model: what learns.
        config: of the stage.
        sample: prompts -> tokens of each answer, with the end token where it ended by itself; deterministic.
        reward: sample, tokens -> number.
        collate: samples, tokens of their answers, prompts -> packed batch; pixels are the prompts'.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GRPOConfig,
        sample: Callable[[Batch], list[list[int]]],
        reward: Callable[[Sample, Sequence[int]], float],
        collate: Callable[[Sequence[Sample], list[list[int]], Batch], Batch],
    ) -> None:
        self.model, self.config = model, config
        self.sample, self.reward, self.collate = sample, reward, collate
        self.reward_sum = 0.0  # of the answers of the last step on this rank
        self._start: dict[str, Tensor] = {}
        self._held: list[Answers] = []
        self._tokens: list[list[list[int]]] = []
        self._restored: Sequence[Mapping[str, Any]] | None = None

    def begin(self) -> None:
        """Take the model as it is for the reference: a copy of what learns, no more; the rest is shared."""
        if self.config.kl:
            self._start = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def __call__(self, step: int, prompts: Sequence[Prompts]) -> list[Answers]:
        """Return the answers of a step; the model must be whole, and nothing here waits for other ranks.

        Args:
            step: from 0; every `inner`-th samples.
            prompts: of each micro-batch, the same ones throughout `inner` steps.
        """
        if step % self.config.inner and self._held:
            return self._held
        self.model.eval()
        with torch.no_grad():
            state = self._restored if step % self.config.inner else None
            self._tokens = [self.sample(p.batch) for p in prompts] if state is None else [s["tokens"] for s in state]
            self.reward_sum = 0.0
            self._held = [self._judge(p, tokens) for p, tokens in zip(prompts, self._tokens, strict=True)]
            for number, answers in enumerate(self._held):
                scorer = cast(TokenScorer, self.model)
                if self.config.inner > 1:
                    answers.old = scorer.target_log_probs(answers.batch) if state is None else state[number]["old"]
                if self.config.kl:
                    with self._as_it_began():
                        answers.reference = scorer.target_log_probs(answers.batch)
        set_modes(self.model)
        return self._held

    def _judge(self, prompts: Prompts, tokens: list[list[int]]) -> Answers:
        rewards = torch.tensor([self.reward(s, t) for s, t in zip(prompts.samples, tokens, strict=True)])
        self.reward_sum += float(rewards.sum())
        advantages = group_advantages(rewards, self.config.group, standardise=self.config.standardise)
        counts = torch.tensor([len(t) for t in tokens])
        return Answers(
            batch=self.collate(prompts.samples, tokens, prompts.batch), advantages=advantages.repeat_interleave(counts)
        )

    @contextmanager
    def _as_it_began(self) -> Iterator[None]:
        """Give what learns the values that it started from."""
        now = {name: param.data for name, param in self.model.named_parameters() if name in self._start}
        try:
            for name, param in self.model.named_parameters():
                if name in now:
                    param.data = self._start[name].to(now[name])
            yield
        finally:
            for name, param in self.model.named_parameters():
                if name in now:
                    param.data = now[name]

    def state(self) -> list[dict[str, Any]] | None:
        """Return what a stop between two steps on the same answers must keep, by micro-batch; plain values, tensors."""
        if self.config.inner == 1:
            return None
        return [{"tokens": t, "old": a.old} for t, a in zip(self._tokens, self._held, strict=True)]

    def restore(self, state: Sequence[Mapping[str, Any]] | None) -> None:
        """Take back what `state` returned."""
        self._restored, self._held = state, []
