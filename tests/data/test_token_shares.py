"""Tokens by source: noted a micro-batch, added up over ranks and repetitions, and asked for by weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmllm.data.mixture import Schedule
from fastmllm.data.token_shares import Share, TokenShares, read_shares, sample_weights


def test_shares_of_ranks_and_of_what_is_done_again(tmp_path: Path) -> None:
    first, second = (TokenShares(tmp_path, rank, ["a", "a/b", "text"]) for rank in (0, 1))
    bounds, labels = torch.tensor([0, 4, 9, 11]), torch.full((14,), -100)
    labels[torch.tensor([3, 7, 8, 12])] = 5
    first.note(0, ["a/s.tar/1", "a/b/s.tar/1", "text/t/0"], bounds, labels)
    second.note(1, ["a/s.tar/2"], torch.tensor([0, 6]))
    first.note(2, ["text/t/1"], torch.tensor([0, 100]))
    assert read_shares(tmp_path) == {"a": Share(2, 10, 1), "a/b": Share(1, 5, 2), "text": Share(2, 102, 0)}
    first.note(2, ["text/t/1"], torch.tensor([0, 7]))  # resumed from before it
    with first.path.open("a") as file:
        file.write('{"micro_batch": 4, "sour')  # killed
    assert read_shares(tmp_path)["text"] == Share(2, 9, 0)
    with pytest.raises(ValueError, match=r"no shares\.jsonl"):
        read_shares(tmp_path / "none")


def test_weights_give_the_shares_that_were_asked_for() -> None:
    means = {"captions": 40.0, "talks": 400.0, "text": 100.0}
    weights = sample_weights({"captions": 2, "talks": 5, "text": 3}, means)
    assert sum(weights.values()) == pytest.approx(1.0)
    taken = Schedule(list(weights.values()), seed=1).taken(100_000)
    tokens = [count * mean for count, mean in zip(taken, means.values(), strict=True)]
    assert [count / sum(tokens) for count in tokens] == pytest.approx([0.2, 0.5, 0.3], abs=1e-3)


@pytest.mark.parametrize("shares, means", [({}, {}), ({"a": 1}, {}), ({"a": 0}, {"a": 1}), ({"a": 1}, {"a": 0})])
def test_shares_without_sense_are_refused(shares: dict, means: dict) -> None:
    with pytest.raises(ValueError, match="token shares"):
        sample_weights(shares, means)
