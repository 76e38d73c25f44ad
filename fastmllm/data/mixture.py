"""Which samples make up step n: a pure function of n, so that a resumed run sees exactly what it would have seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from fastmllm.data.augment import rng_of
from fastmllm.data.sample import Sample

BLOCK = 1000  # draws that are shared out together
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly
CHUNK = 256  # blocks whose shares are counted at a time


class Schedule:
    """Tell which part of a mixture draw d is, and how often that part was drawn before, without any state.

    In each block of `BLOCK` draws a part has its share, rounded up or down; which of the two is drawn so that over all
    seeds, and over the blocks of one, the mean is the exact share. The order within a block is seeded.

    Args:
        weights: of the parts, above 0.
        seed: of the orders and roundings.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self.weights, self.seed = list(weights), seed
        exact = np.cumsum(np.asarray(weights, dtype=np.float64) / sum(weights)) * BLOCK
        self._edges = np.concatenate([[0.0], np.round(exact[:-1], 9), [BLOCK]])
        self._phase = float(rng_of("rounding", seed).random())
        # Per instance: a cache on the method would keep every schedule alive.
        self._block = lru_cache(maxsize=4)(self._make_block)
        self._counted = lru_cache(maxsize=2)(self._count_chunk)
        self._before = [np.zeros(len(weights), dtype=np.int64)]  # draws of each part before chunk i

    def __reduce__(self) -> tuple[object, ...]:
        return _schedule, (self.weights, self.seed)

    def __call__(self, draw: int) -> tuple[int, int]:
        """Return (part, times that it was drawn before) of a draw, from 0."""
        block, at = divmod(draw, BLOCK)
        part_of, before = self._block(block)
        return int(part_of[at]), int(before[at])

    def taken(self, draws: int) -> list[int]:
        """Return how often each part is among the first draws."""
        block, at = divmod(draws, BLOCK)
        part_of, taken = self._block(block)[0], self._first(block)
        return [int(n) + int((part_of[:at] == part).sum()) for part, n in enumerate(taken)]

    def _counts(self, first: int, last: int) -> np.ndarray:
        phase = (self._phase + np.arange(first, last) * GOLDEN) % 1.0
        return np.diff(np.floor(self._edges + phase[:, None]), axis=1).astype(np.int64)  # (blocks, parts)

    def _count_chunk(self, chunk: int) -> np.ndarray:
        return self._counts(chunk * CHUNK, (chunk + 1) * CHUNK)

    def _first(self, block: int) -> np.ndarray:
        """Return the draws of each part before a block."""
        chunk, at = divmod(block, CHUNK)
        while len(self._before) <= chunk:
            self._before.append(self._before[-1] + self._count_chunk(len(self._before) - 1).sum(axis=0))
        return self._before[chunk] + self._counted(chunk)[:at].sum(axis=0)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        counts, first = self._counted(block // CHUNK)[block % CHUNK], self._first(block)
        part_of = rng_of("schedule", self.seed, block).permutation(
            np.repeat(np.arange(len(counts)), counts)
        )  # (BLOCK,)
        before = np.zeros(BLOCK, dtype=np.int64)
        for part, number in enumerate(counts):
            before[part_of == part] = first[part] + np.arange(number)
        return part_of, before


def _schedule(weights: Sequence[float], seed: int) -> Schedule:
    return Schedule(weights, seed=seed)


class MixtureSampler:
    """Draw batches from several tasks by weight, without any state.

    Tasks are drawn by a `Schedule`; each goes through its samples in a seeded order, all of them once before any comes
    again.

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
        self.samples = {task: tuple(samples[task]) for task in self.tasks}
        self.schedule = Schedule([weights[task] for task in self.tasks], seed=seed)
        self.batch_size = batch_size
        self.seed = seed
        self._order = lru_cache(maxsize=4 * len(self.tasks))(self._make_order)

    def batch_samples(self, step: int) -> list[Sample]:
        """Return the samples of a step (a micro-batch, where steps are counted so).

        Args:
            step: from 0.
        """
        if step < 0:
            raise ValueError(f"mixture: step must be 0 or more, got {step}")
        return [self.draw(step * self.batch_size + i) for i in range(self.batch_size)]

    def draw(self, index: int) -> Sample:
        """Return the sample of a draw, from 0."""
        number, seen = self.schedule(index)
        return self.sample(number, seen)

    def sample(self, number: int, seen: int) -> Sample:
        """Return a task's sample by the number of its samples drawn before; epochs follow each other."""
        task = self.tasks[number]
        epoch, position = divmod(seen, len(self.samples[task]))
        return self.samples[task][int(self._order(number, epoch)[position])]

    def _make_order(self, number: int, epoch: int) -> np.ndarray:
        task = self.tasks[number]
        return rng_of("order", self.seed, task, epoch).permutation(len(self.samples[task]))
