from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmllm.data.balance import BatchPlan, balance, spread


def works(costs: list[int], order: list[int], plan: BatchPlan) -> np.ndarray:
    """Work of each micro-batch: (steps, accumulation, ranks)."""
    work = np.asarray(costs)[order].reshape(-1, plan.batch_size).sum(axis=1)
    return work.reshape(-1, plan.micro_batches // plan.ranks, plan.ranks)


def mean_spread(work: np.ndarray) -> float:
    return float(np.mean([spread(row.tolist()) for row in work.reshape(-1, work.shape[-1])]))


def skewed(num: int, seed: int = 0) -> list[int]:
    """Visual tokens of a usual mix: text alone, small pictures, and a few of very many tiles."""
    draw = np.random.default_rng(seed).random(num)
    return np.select([draw < 0.3, draw < 0.8, draw < 0.95], [0, 64, 576], 4096).tolist()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_sample_has_one_place(batch: int, accumulation: int, ranks: int, steps: int, seed: int) -> None:
    plan = BatchPlan(batch_size=batch, micro_batches=accumulation * ranks, ranks=ranks, window=steps, seed=seed)
    costs = skewed(batch * accumulation * ranks * steps, seed)
    assert sorted(balance(costs, plan, 5)) == list(range(len(costs)))
    assert balance(costs, plan, 5) == balance(costs, plan, 5)


def test_ranks_get_nearly_equal_work() -> None:
    plan = BatchPlan(batch_size=4, micro_batches=16, ranks=8, window=4)
    costs = skewed(4 * 16 * 4)
    drawn = mean_spread(works(costs, list(range(len(costs))), plan))
    assert drawn > 1.0  # the busiest rank has more than twice the mean
    assert mean_spread(works(costs, balance(costs, plan, 0), plan)) < 0.1 * drawn
    one, costs = BatchPlan(batch_size=16, micro_batches=8, ranks=8, window=1), skewed(16 * 8)
    drawn = mean_spread(works(costs, list(range(len(costs))), one))
    assert mean_spread(works(costs, balance(costs, one, 0), one)) < 0.3 * drawn
    # samples cannot be split: with one a micro-batch, like ones must meet
    single = BatchPlan(batch_size=1, micro_batches=8, ranks=8, window=16)
    costs = skewed(8 * 16)
    drawn = mean_spread(works(costs, list(range(len(costs))), single))
    assert mean_spread(works(costs, balance(costs, single, 0), single)) < 0.3 * drawn


def test_micro_batches_of_like_work_make_a_step() -> None:
    plan, costs = BatchPlan(batch_size=2, micro_batches=2, ranks=2, window=2), [10, 9, 9, 9, 9, 9, 0, 0]
    assert sorted(sorted(step[0]) for step in works(costs, balance(costs, plan, 0), plan)) == [[9, 10], [18, 18]]


def test_over_accumulation_the_ranks_even_out() -> None:
    plan = BatchPlan(batch_size=1, micro_batches=4, ranks=2, window=1)
    work = works([9, 7, 4, 1], balance([9, 7, 4, 1], plan, 0), plan)[0]
    assert sorted(work[0]) == [7, 9]  # at the same time: neighbours
    assert sorted(work.sum(axis=0)) == [10, 11]


def test_a_step_has_the_same_samples_on_any_number_of_ranks_and_steps_are_shuffled() -> None:
    costs = skewed(3 * 4 * 6)
    steps = {}
    for ranks in (1, 2, 4):
        order = balance(costs, BatchPlan(batch_size=3, micro_batches=4, ranks=ranks, window=6), 1)
        steps[ranks] = [sorted(order[i : i + 12]) for i in range(0, 72, 12)]
    assert steps[1] == steps[2] == steps[4]
    plan = BatchPlan(batch_size=1, micro_batches=1, window=40)
    heaviest = [balance(list(range(40)), plan, window).index(39) for window in range(20)]
    assert len(set(heaviest)) > 10  # the heaviest step comes anywhere


def test_spread() -> None:
    assert spread([2, 4]) == pytest.approx(1 / 3)
    assert spread([0, 0]) == spread([5]) == 0.0


def test_bad_plans() -> None:
    for bad in ({"batch_size": 0}, {"batch_size": 1, "window": -1}, {"batch_size": 1, "ranks": 0}):
        with pytest.raises(ValueError, match="give at least 1 sample"):
            BatchPlan(**bad)
    with pytest.raises(ValueError, match="3 micro-batches a step do not divide over 2 ranks"):
        BatchPlan(batch_size=1, micro_batches=3, ranks=2)
    with pytest.raises(ValueError, match="5 samples are no whole steps of 2 times 2"):
        balance([1] * 5, BatchPlan(batch_size=2, micro_batches=2), 0)
