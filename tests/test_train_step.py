"""The benchmark of the trainers: both sides learn the same, and its figures are those of the steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

import torch
import train_step
import train_step_mix as mix

from fastmllm.models.families import build
from fastmllm.models.mllm import MLLM

TOY = mix.Case(
    name="toy", what="toy", order="random", batch_size=2, accumulation=2,
    vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 28},
    text={"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024},
    providers=("fastmllm", "Trainer"),
)  # fmt: skip


def test_both_sides_learn_the_same() -> None:
    row = train_step.measure(TOY, 1)
    ours, theirs = row["losses"]["fastmllm"], row["losses"]["Trainer"]
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, abs=2e-5)
    assert ours[2] < ours[1] < ours[0]
    data = mix.samples(TOY, 3)
    each = [mix.length(TOY, n) for n in data.order]
    assert row["tokens_a_step"] == sum(each[8:])
    assert row["padding"]["fastmllm"] == 0 < row["padding"]["Trainer"]
    assert all(seconds > 0 for its in row["seconds"].values() for clock in its.values() for seconds in clock)
    assert all(value > 0 for key in ("samples_per_s", "model_tflops", "peak_mib") for value in row[key].values())
    assert train_step.table(row).row_count == 2


@pytest.mark.parametrize("case", [*mix.ON_CPU, *mix.ON_GPU], ids=lambda case: f"{case.name}-{case.dtype}")
def test_every_case_can_be_made_and_fed(case: mix.Case) -> None:
    with torch.device("meta"):
        theirs = mix.build(case)
        ours = build(theirs.config.to_dict(), case.name)
    counts = [sum(p.numel() for p in model.parameters()) for model in (theirs, MLLM(ours, {}))]
    assert 0 <= counts[0] - counts[1] < counts[0] / 10  # blocks behind the layer that is used
    data = mix.samples(case, 2)
    assert len(data) == 2 * case.samples
    for at, number in enumerate(data.order[:8]):
        sample = data[at]
        assert mix.length(case, number) <= case.text["max_position_embeddings"]
        assert mix.FIRST <= min(sample.ids[1:]) <= max(sample.ids) < case.text["vocab_size"]
        assert {picture.shape for picture in sample.pictures} <= {(case.vision["image_size"],) * 2 + (3,)}
    assert case.providers[0] == "fastmllm"
    assert {"Trainer", "Trainer + patch", "Trainer + Liger"} >= set(case.providers[1:])


def fake(loss: float, seconds: float) -> dict[str, Any]:
    return {"loss": loss, "cpu": seconds, "wall": 2 * seconds, "peak": 2**20, "tokens": 50, "targets": 10,
            "padding": 0.0, "model_tflop": 0.5, "peak_tflops": 2.0}  # fmt: skip


def test_figures_are_those_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [fake(5, 100), fake(4, 100), fake(3, 1), fake(2, 2), fake(1, 4)]
    theirs = [fake(5, 1), fake(4, 1), fake(3, 3), fake(2, 4), fake(1, 20)]
    monkeypatch.setattr(train_step, "CLOCK", "cpu")
    monkeypatch.setattr(train_step, "train", lambda case, data: {"fastmllm": ours, "Trainer": theirs})
    row = train_step.measure(TOY, 3)
    assert row["ratio"] == {"Trainer": 3.0}  # of 3, 2 and 5; what comes before is warming up
    assert row["samples_per_s"] == {"fastmllm": 4 / 2, "Trainer": 4 / 4}
    assert row["model_tflops"] == {"fastmllm": 0.25, "Trainer": 0.125}
    assert row["mfu"] == {"fastmllm": 0.125, "Trainer": 0.0625}
    assert row["scored"] == 0.2


@pytest.mark.parametrize(("step", "apart"), [(0, 2e-4), (2, 2e-3)])
def test_other_losses_are_no_result(step: int, apart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = [fake(5, 1) for _ in range(3)], [fake(5, 1) for _ in range(3)]
    theirs[step]["loss"] += apart
    monkeypatch.setattr(train_step, "train", lambda case, data: {"fastmllm": ours, "Trainer": theirs})
    with pytest.raises(SystemExit, match="losses of fastmllm and Trainer differ"):
        train_step.measure(TOY, 1)


def test_a_rank_that_ends_says_why(tmp_path: Path) -> None:
    side = object.__new__(train_step.Side)
    mine, its = train_step.multiprocessing.Pipe()
    its.close()
    log = tmp_path / "log.txt"
    log.write_text("out of memory")
    side.provider, side._pipes, side._logs = "Trainer", [mine], [log]
    with pytest.raises(SystemExit, match=r"(?s)Trainer ended.*out of memory"):
        side.took()


def test_samples_are_the_mix() -> None:
    data = mix.Samples(TOY, range(300))
    for number in range(0, 300, 7):
        sample, again = data[number], data[number]
        assert (sample.ids, sample.labels) == (again.ids, again.labels)
        assert len(sample.ids) + len(sample.pictures) * TOY.visual_tokens == mix.length(TOY, number)
        assert all(label in (mix.IGNORE, token) for token, label in zip(sample.ids, sample.labels, strict=True))
        assert min(sample.ids[1:]) >= mix.FIRST
        assert max(sample.ids) < TOY.text["vocab_size"]
        assert sample.labels[-1] != mix.IGNORE == sample.labels[1]
    shown = [len(data[number].pictures) for number in range(300)]
    assert 0.02 < shown.count(0) / 300 < 0.1  # 40 of 724
    assert 0.04 < sum(count > 1 for count in shown) / 300 < 0.14  # 60 of 724


def test_grouping_is_the_trainers_and_saves_most_of_the_padding() -> None:
    case = replace(TOY, batch_size=8, accumulation=1)
    grouped = replace(case, order="grouped")
    apart, together = (mix.padding(c, mix.samples(c, 10)) for c in (case, grouped))
    assert together < 0.15 < 0.3 < apart
    lengths = [mix.length(grouped, n) for n in mix.samples(grouped, 10).order]
    means = [sum(lengths[at : at + 8]) for at in range(8, 80, 8)]
    assert means == sorted(means, reverse=True)  # evenly from one megabatch, longest first
