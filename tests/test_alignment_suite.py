"""The benchmark of a DPO step: every provider computes the same loss, and its figures are those of the steps."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

import alignment


def test_all_sides_compute_the_same_loss_of_a_toy() -> None:
    found = alignment.main(rounds=1, pairs=2, depth=3, width=32)
    assert list(found["rows"]) == ["ours", "image for each answer", "reference computed", "both", "TRL DPOTrainer"]
    assert found["largest difference"] < 1e-5
    assert abs(found["loss"] - 0.6931) > 1e-3  # the policy has left its reference
    assert all(row["seconds"] > 0 for row in found["rows"].values())
    assert found["rows"]["ours"]["ratio"] == 1.0
    assert found["shape"]["tower"] == [3, 32]
