"""Equal vision work for all ranks: which samples of a few steps go together into which micro-batch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from fastmllm.data.augment import rng_of


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """How many samples go where.

    Args:
        batch_size: samples of a micro-batch.
        micro_batches: of a step, over accumulation and ranks.
        ranks: micro-batches computed at the same time.
        window: steps whose samples are arranged so that ranks get equal vision work; 0 = as drawn. With 1 every step
            has the very samples that it has with 0.
        full: in place of a sample that turns out to be unusable comes one of a later step, so that all micro-batches
            have equally many; else its place stays empty.
        seed: of all orders.
    """

    batch_size: int
    micro_batches: int = 1
    ranks: int = 1
    window: int = 0
    full: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.batch_size, self.micro_batches, self.ranks) < 1 or self.window < 0:
            raise ValueError(f"stream: {self}: give at least 1 sample, micro-batch and rank, and no window below 0")
        if self.micro_batches % self.ranks:
            raise ValueError(f"stream: {self.micro_batches} micro-batches a step do not divide over {self.ranks} ranks")


def spread(work: Sequence[float]) -> float:
    """Return how much the busiest rank has above the mean: max / mean - 1; 0 where nobody has any.

    A step takes as long as its busiest rank, so this is the share of time that the others wait.
    """
    mean = sum(work) / len(work)
    return max(work) / mean - 1.0 if mean else 0.0


def balance(costs: Sequence[int], plan: BatchPlan, window: int) -> list[int]:
    """Arrange the samples of a window of steps.

    Longest first into the micro-batch with the least work that has room; micro-batches of equal work make a step, in
    which ranks that compute at the same time have neighbours in the order of work; the order of the steps is seeded.
    Which samples make a step depends on `micro_batches`, not on how these are spread over accumulation and ranks.

    Args:
        costs: vision work of each sample; as many as fill whole steps.
        plan: sizes and seed.
        window: its number, for the order of its steps.

    Returns:
        The samples' numbers, micro-batch by micro-batch: (step, accumulation, rank, batch_size), flattened.

    Raises:
        ValueError: samples that do not fill steps.
    """
    batch_size, micro_batches, ranks = plan.batch_size, plan.micro_batches, plan.ranks
    if not costs or len(costs) % (batch_size * micro_batches):
        raise ValueError(f"balance: {len(costs)} samples are no whole steps of {micro_batches} times {batch_size}")
    batches: list[list[int]] = [[] for _ in range(len(costs) // batch_size)]
    lightest = [(0, number) for number in range(len(batches))]  # a heap already
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        work, number = heapq.heappop(lightest)
        batches[number].append(item)
        if len(batches[number]) < batch_size:
            heapq.heappush(lightest, (work + costs[item], number))
    work_of = [sum(costs[item] for item in batch) for batch in batches]
    ordered = sorted(range(len(batches)), key=lambda number: (-work_of[number], number))
    order: list[int] = []
    for first in rng_of("window", plan.seed, window).permutation(len(batches) // micro_batches):
        members = ordered[first * micro_batches : (first + 1) * micro_batches]
        total = [0] * ranks  # work of each rank in this step
        for at in range(0, micro_batches, ranks):
            together = members[at : at + ranks]  # heaviest first
            place = dict(zip(sorted(range(ranks), key=lambda rank: (total[rank], rank)), together, strict=True))
            for rank in range(ranks):
                total[rank] += work_of[place[rank]]
                order += sorted(batches[place[rank]])
    return order
