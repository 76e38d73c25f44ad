from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmllm.data.mixture import BLOCK, CHUNK, MixtureSampler, Schedule
from fastmllm.data.sample import Sample


def world(**sizes: int) -> dict[str, list[Sample]]:
    return {
        task: [Sample(id=f"{task}{i}", prompt="p", answer="a", task=task) for i in range(size)]
        for task, size in sizes.items()
    }


def test_a_step_is_a_pure_function_of_its_number() -> None:
    first = MixtureSampler(world(name=7, count=5), {"name": 3, "count": 1}, batch_size=4, seed=9)
    forward = [first.batch_samples(step) for step in range(600)]  # more than two blocks
    fresh = MixtureSampler(world(name=7, count=5), {"name": 3, "count": 1}, batch_size=4, seed=9)
    assert [fresh.batch_samples(step) for step in (599, 3, 250, 251)] == [forward[i] for i in (599, 3, 250, 251)]
    other = MixtureSampler(world(name=7, count=5), {"name": 3, "count": 1}, batch_size=4, seed=10)
    assert [other.batch_samples(step) for step in range(9)] != forward[:9]


def test_the_batch_size_only_cuts_the_same_stream() -> None:
    small = MixtureSampler(world(name=7, count=5), batch_size=2)
    large = MixtureSampler(world(name=7, count=5), batch_size=6)
    first = [sample for step in range(9) for sample in small.batch_samples(step)]
    assert first == [sample for step in range(3) for sample in large.batch_samples(step)]


def test_weights_are_met_in_every_block() -> None:
    sampler = MixtureSampler(world(a=3, b=30, c=1, d=9), {"a": 5, "b": 3, "c": 2, "d": 0}, batch_size=BLOCK)
    for block in range(3):
        counts = Counter(sample.task for sample in sampler.batch_samples(block))
        assert counts == {"a": 500, "b": 300, "c": 200}


def test_every_sample_comes_once_before_any_comes_again() -> None:
    sampler = MixtureSampler(world(name=11, count=6), batch_size=17, seed=1)
    seen = [sample.id for step in range(200) for sample in sampler.batch_samples(step)]
    for task, size in (("name", 11), ("count", 6)):
        ids = [name for name in seen if name.startswith(task)]
        epochs = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        assert len(epochs) > 50
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 40  # in another order each time


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_shares_are_exact_in_the_long_run_and_counts_add_up(weights: list[float], seed: int) -> None:
    schedule, blocks, seen = Schedule(weights, seed=seed), CHUNK + 20, [0] * len(weights)
    for draw in (0, 1, BLOCK - 1, BLOCK, CHUNK * BLOCK - 1, CHUNK * BLOCK):
        part, before = schedule(draw)
        assert Schedule(weights, seed=seed)(draw) == (part, before)  # of the draw alone
    for block in range(blocks):
        counts = schedule._counts(block, block + 1)[0]
        assert counts.sum() == BLOCK
        assert all(abs(count - w / sum(weights) * BLOCK) < 2 for count, w in zip(counts, weights, strict=True))
        seen = [s + int(c) for s, c in zip(seen, counts, strict=True)]
    # a constant rounding would be off by up to half a draw in each block
    assert all(abs(s - w / sum(weights) * BLOCK * blocks) < 8 for s, w in zip(seen, weights, strict=True))


def test_a_rare_task_is_drawn_as_often_as_it_should_be() -> None:
    schedule = Schedule([1.0, 2999.0], seed=3)
    drawn = [schedule(draw) for draw in range(30 * BLOCK)]
    assert sum(part == 0 for part, _ in drawn) in (9, 10, 11)
    for part in (0, 1):
        assert [before for p, before in drawn if p == part] == list(range(sum(p == part for p, _ in drawn)))
    over_seeds = [Schedule([1.0, 2999.0], seed=seed)._counts(0, 1)[0][0] for seed in range(600)]
    assert 160 < sum(over_seeds) < 240  # a third of 600, three standard deviations to either side


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"nmae": 1.0}, r"task 'nmae' has no samples; the tasks here are \['name'\]"),
        ({"empty": 1.0}, "task 'empty' has no samples"),
        ({"name": -1.0}, "weight of 'name' must be 0 or more"),
        ({"name": float("nan")}, "weight of 'name' must be 0 or more"),
        ({"name": 0.0}, "no task has a weight above 0"),
        ({}, "no task has a weight above 0"),
    ],
)
def test_bad_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureSampler(world(name=3, empty=0), weights, batch_size=2)


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        MixtureSampler(world(name=3), batch_size=0)
    with pytest.raises(ValueError, match="step must be 0 or more"):
        MixtureSampler(world(name=3), batch_size=1).batch_samples(-1)
