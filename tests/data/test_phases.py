"""Phases of a stage: the right tasks at the right step, nothing lost between them."""

from __future__ import annotations

from collections import Counter

import pytest

from fastmllm.data.mixture import MixtureSampler
from fastmllm.data.phases import Phase, PhasedMixture, ends_of, exposure, growing, levels
from fastmllm.data.sample import Sample


def questions(task: str, count: int) -> list[Sample]:
    return [Sample(id=f"{task}/{i}", prompt="?", answer="!", task=task) for i in range(count)]


SAMPLES = {"a": questions("a", 50), "b": questions("b", 400), "c": questions("c", 90)}


def drawn(phases: tuple[Phase, ...], steps: int = 100, **more: int) -> tuple[PhasedMixture, list[list[Sample]]]:
    made = PhasedMixture(SAMPLES, phases, steps=steps, micro_batches=more.get("micro_batches", 2), batch_size=4, seed=3)
    return made, [made.batch_samples(index) for index in range(steps * more.get("micro_batches", 2))]


def test_each_phase_has_its_mixture_and_goes_on_where_the_last_one_left_a_task() -> None:
    phases = (Phase(share=1, mixture={"a": 1, "b": 1}), Phase(share=3, mixture={"b": 1, "c": 3}))
    made, batches = drawn(phases)
    first, second = batches[: 25 * 2], batches[25 * 2 :]
    assert made.phase(49) is phases[0]
    assert made.phase(50) is made.phase(10_000) is phases[1]
    assert Counter(s.task for batch in first for s in batch) == pytest.approx({"a": 100, "b": 100}, abs=18)
    later = Counter(s.task for batch in second for s in batch)
    assert later["b"] / sum(later.values()) == pytest.approx(0.25, abs=0.03)
    assert "a" not in later
    b = [s.id for batch in batches for s in batch if s.task == "b"]
    assert 200 < len(b) <= 400
    assert len(set(b)) == len(b)  # none comes again before all have come
    assert batches[51] == made.batch_samples(51)


def test_one_phase_is_the_mixture() -> None:
    weights = {"a": 2.0, "c": 1.0}
    _, batches = drawn((Phase(share=7, mixture=weights),))
    plain = MixtureSampler(SAMPLES, weights, batch_size=4, seed=3)
    assert batches == [plain.batch_samples(index) for index in range(200)]


def test_growing_phases_and_what_they_show() -> None:
    phases = growing(("a", "b", "c"), newest=0.6)
    assert [dict(phase.mixture) for phase in phases] == [
        {"a": 0.6}, {"a": pytest.approx(0.4), "b": 0.6}, {"a": pytest.approx(0.2), "b": pytest.approx(0.2), "c": 0.6},
    ]  # fmt: skip
    assert exposure(phases) == pytest.approx({"a": 1.6 / 3, "b": 0.8 / 3, "c": 0.6 / 3})
    assert sum(exposure((Phase(share=1, mixture={"a": 2}), Phase(share=3, mixture={"b": 5}))).values()) == 1.0
    assert [dict(p.mixture) for p in growing(("a", "b"), newest=1.0)] == [{"a": 1.0}, {"b": 1.0}]


def test_levels_go_from_easy_to_difficult() -> None:
    cut = levels(SAMPLES["a"], [float(-i) for i in range(50)], 3)
    assert [len(part) for part in cut.values()] == [16, 17, 17]
    assert cut["level 0"][0].id == "a/49"
    assert [sample for part in cut.values() for sample in part] == SAMPLES["a"][::-1]
    with pytest.raises(ValueError, match="levels"):
        levels(SAMPLES["a"], [1.0], 1)


def test_phases_end_on_steps() -> None:
    assert ends_of((Phase(share=1), Phase(share=1), Phase(share=1)), 10) == [3, 7, 10]
    with pytest.raises(ValueError, match="has none"):
        ends_of((Phase(share=1), Phase(share=100)), 10)
    for bad in ({"share": 0.0}, {"share": 1, "image_size": 0}, {"share": 1, "visual_tokens": (0,)}):
        with pytest.raises(ValueError, match="phase"):
            Phase(**bad)
    with pytest.raises(ValueError, match="phases"):
        growing(())
