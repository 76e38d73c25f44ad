"""Transfer is measured from one start, and the order is the best of all orders."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from fastmllm.data import transfer
from fastmllm.data.transfer import TransferMatrix, measure_transfer

HELPS = {("a", "a"): 4.0, ("b", "b"): 2.0, ("c", "c"): 1.0, ("c", "a"): 3.0, ("a", "b"): 1.0}


def test_every_training_begins_at_the_start_which_is_put_back() -> None:
    state = dict.fromkeys("abc", 1.0)
    calls: list[str] = []

    def train(skill: str) -> None:
        calls.append(skill)
        for (trained, helped), gain in HELPS.items():
            state[helped] += gain if trained == skill else 0.0

    found = measure_transfer("abc", train, lambda skill: state[skill], lambda: state.update(dict.fromkeys("abc", 1.0)))
    assert state == dict.fromkeys("abc", 1.0)
    assert calls == ["a", "b", "c"]
    assert found.after[2] == (4.0, 1.0, 2.0)
    assert found.gain() == pytest.approx(np.array([[1, 0.5, 0], [0, 1, 0], [0.75, 0, 1]]))
    assert found.order() == ("c", "a", "b")


@pytest.mark.parametrize("exact", [14, 0])
def test_the_order_is_the_best_of_all(monkeypatch: pytest.MonkeyPatch, exact: int) -> None:
    monkeypatch.setattr(transfer, "EXACT", exact)
    for seed in range(6):
        after = np.random.default_rng(seed).normal(size=(5, 5)) + 5 * np.eye(5)
        found = TransferMatrix(tuple("abcde"), (0.0,) * 5, tuple(map(tuple, after)))
        gain = found.gain()

        def value(order, gain=gain):
            places = ["abcde".index(name) for name in order]
            return sum(gain[i, j] for at, i in enumerate(places) for j in places[at + 1 :])

        best = max(map(value, permutations("abcde")))
        got = value(found.order())
        assert got == pytest.approx(best) if exact else got > 0.6 * best


def test_skills_that_nothing_helps_stay_in_their_order(tmp_path: Path) -> None:
    found = TransferMatrix(("x", "y", "z"), (0.0,) * 3, ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 3.0)))
    assert found.order() == ("x", "y", "z")
    assert found.gain()[1, 1] == -0.5  # its own training made it worse: in units of the mean gain
    found.save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["order"] == ["x", "y", "z"]


def test_scores_and_skills_without_sense() -> None:
    with pytest.raises(ValueError, match="two or more"):
        measure_transfer(["a"], print, lambda skill: 0.0, lambda: None)
    with pytest.raises(ValueError, match="no number"):
        measure_transfer("ab", lambda skill: None, lambda skill: float("nan"), lambda: None)
