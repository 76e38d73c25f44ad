"""Which samples make up step n: a pure function of n, so that a resumed run sees exactly what it would have seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from fastmllm.data.augment import rng_of
from fastmllm.data.sample import Sample

BLOCK = 1000  # draws after which the weights are met exactly


class MixtureSampler:
    """Draw batches from several tasks by weight, without any state.

    In each block of `BLOCK` draws every task has its exact share, in a seeded order; each task goes through its
    samples in a seeded order, all of them once before any comes again.

    Args:
        samples: task -> samples.
        weights: task -> weight; tasks without one, or with 0, are left out. None = by number of samples.
        batch_size: samples of a step.
        seed: of every order.

    Raises:
        ValueError: a weight for a task that has no samples, a negative weight, or nothing left to draw.
    """

    def __init__(
        self,
        samples: Mapping[str, Sequence[Sample]],
        weights: Mapping[str, float] | None = None,
        *,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"mixture: batch_size must be at least 1, got {batch_size}")
        if weights is None:
            weights = {task: float(len(items)) for task, items in samples.items()}
        for task, weight in weights.items():
            if not (weight >= 0.0 and np.isfinite(weight)):
                raise ValueError(f"mixture: weight of {task!r} must be 0 or more, got {weight}")
            if weight > 0.0 and not samples.get(task):
                have = sorted(name for name, items in samples.items() if items)
                raise ValueError(f"mixture: task {task!r} has no samples; the tasks here are {have}")
        self.tasks = tuple(sorted(task for task, weight in weights.items() if weight > 0.0))
        if not self.tasks:
            raise ValueError("mixture: no task has a weight above 0; nothing to train on")
        if len(self.tasks) > BLOCK:
            raise ValueError(f"mixture: {len(self.tasks)} tasks, at most {BLOCK}")
        self.samples = {task: tuple(samples[task]) for task in self.tasks}
        self.counts = _shares([weights[task] for task in self.tasks])
        self.batch_size = batch_size
        self.seed = seed
        # Per instance: a cache on the method would keep every sampler alive.
        self._schedule = lru_cache(maxsize=4)(self._make_schedule)
        self._order = lru_cache(maxsize=4 * len(self.tasks))(self._make_order)

    def batch_samples(self, step: int) -> list[Sample]:
        """Return the samples of a step (a micro-batch, where steps are counted so).

        Args:
            step: from 0.
        """
        if step < 0:
            raise ValueError(f"mixture: step must be 0 or more, got {step}")
        return [self._draw(step * self.batch_size + i) for i in range(self.batch_size)]

    def _draw(self, index: int) -> Sample:
        block, at = divmod(index, BLOCK)
        task_of, rank = self._schedule(block)
        number = int(task_of[at])
        # How often the task was drawn before: whole blocks, and this one so far.
        seen = block * self.counts[number] + int(rank[at])
        task = self.tasks[number]
        epoch, position = divmod(seen, len(self.samples[task]))
        return self.samples[task][int(self._order(number, epoch)[position])]

    def _make_schedule(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        plain = np.repeat(np.arange(len(self.tasks)), self.counts)
        task_of = rng_of("schedule", self.seed, block).permutation(plain)  # (BLOCK,)
        rank = np.zeros(BLOCK, dtype=np.int64)
        for number, count in enumerate(self.counts):
            rank[task_of == number] = np.arange(count)
        return task_of, rank

    def _make_order(self, number: int, epoch: int) -> np.ndarray:
        task = self.tasks[number]
        return rng_of("order", self.seed, task, epoch).permutation(len(self.samples[task]))


def _shares(weights: Sequence[float]) -> list[int]:
    # Largest remainders, and at least one draw for every task.
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for i in range(max(0, BLOCK - sum(counts))):
        counts[by_remainder[i % len(counts)]] += 1
    while sum(counts) > BLOCK:
        counts[counts.index(max(counts))] -= 1
    return counts
