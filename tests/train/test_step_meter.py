"""What a step's record says, of one rank and of several, for every kind of batch."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_compositions import labels, redrawn, samples, tiny
from tiny_vlm import tiny_vlm
from torch import nn
from train_toy import sample, toy, trainer

from fastmllm.data.packing import Batch
from fastmllm.data.preference import PairBatch
from fastmllm.train.grpo import Answers
from fastmllm.train.meters import MeterConfig, StepRecord, read_log
from fastmllm.train.step_meter import StepMeter, batch_contents, peak_memory


def packed(targets: int = 2) -> Batch:
    """Two samples in 9 tokens, the first with an image of 4."""
    return Batch(
        input_ids=torch.arange(9), labels=torch.tensor([-100] * (9 - targets) + [3] * targets),
        position_ids=torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2]), cu_seqlens=torch.tensor([0, 6, 9], dtype=torch.int32),
        max_seqlen=6, image_index=torch.tensor([1, 2, 3, 4]),
        pixels=torch.zeros(1, 32, 32, 3, dtype=torch.uint8), num_targets=targets, ids=["a", "b"], image_paths=["x"],
    )  # fmt: skip


def test_what_is_in_a_batch_of_every_kind() -> None:
    batch, none = packed(), torch.zeros(0, dtype=torch.int64)
    assert batch_contents(batch) == (9, 4, 2, 0, 0, 0, 0)
    pairs = PairBatch(batch, torch.tensor([0]), torch.tensor([1]), none, none, torch.zeros(2))
    assert batch_contents(pairs) == (9, 4, 2, 0, 0, 0, 0)
    assert batch_contents(Answers(batch=batch, advantages=torch.zeros(2))) == (9, 4, 2, 0, 0, 0, 0)


def test_a_batch_without_a_target_is_padding() -> None:
    assert batch_contents(packed(targets=0)) == (9, 4, 2, 9, 0, 0, 0)


@pytest.mark.parametrize(
    "parts",
    [("vit", "fixed", "mlp", "tokens"), ("mllama", "mllama", "none", "mllama"), ("vit", "dual", "mlp", "cogagent")],
)
def test_a_composition_learns_and_is_measured(tmp_path: Path, parts: tuple[str, str, str, str]) -> None:
    model = copy.deepcopy(redrawn(tiny(*parts)))  # others share it
    inputs = model.pack(samples(), labels(samples()))
    across = model._decode(inputs, None)[1]
    seen = sum(inputs.counts) + (0 if across is None or across.tokens is None else len(across.tokens))
    run = trainer(
        tmp_path, model, batches=lambda index: inputs, changes={"steps": 2, "trainable": {"images.*": 1e-4}},
        engine={"meters": MeterConfig(peak_tflops=0.5)},
    )  # fmt: skip
    run.run()
    for record in read_log(tmp_path / "log.jsonl"):
        assert (record.tokens, record.visual_tokens, record.samples) == (inputs.num_tokens, seen, 3)
        assert record.vision_ms
        assert record.vision_max_ms == record.vision_ms < record.step_ms
        assert record.model_tflop
        assert record.hardware_tflop
        assert record.model_tflop < record.hardware_tflop
        assert record.mfu == pytest.approx(record.model_tflop / (0.5 * record.step_ms / 1000))
        assert record.hfu == pytest.approx(record.hardware_tflop / (0.5 * record.step_ms / 1000))
        planned, shown = inputs.encoder_pixels
        assert record.pixel_waste == pytest.approx(1 - shown / planned)
        assert 0 < shown <= planned


def test_an_unknown_peak_is_not_guessed(tmp_path: Path) -> None:
    trainer(tmp_path, toy(), engine={"dtype": "bfloat16"}).run()
    record = read_log(tmp_path / "log.jsonl")[-1]
    assert record.mfu is None
    assert record.hfu is None
    assert record.model_tflop
    assert "mfu" not in record.figures()


def test_hooks_are_gone_after_the_stage(tmp_path: Path) -> None:
    model = toy()
    trainer(tmp_path, model).run()
    hooks = [
        hook.__module__
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert not [name for name in hooks if name.startswith("fastmllm")]


def test_waiting_for_batches_is_measured(tmp_path: Path) -> None:
    def slow(index: int) -> Any:
        time.sleep(0.3)
        return sample(index)

    steps: dict[str, Any] = {"changes": {"steps": 2}}
    trainer(tmp_path, toy(), batches=slow, **steps).run()
    first = read_log(tmp_path / "log.jsonl")[0]  # later ones are made during the step before
    assert first.wait_ms is not None
    assert 200 < first.wait_ms < first.step_ms
    trainer(tmp_path / "fast", toy(), **steps).run()
    assert min(record.wait_ms or 0.0 for record in read_log(tmp_path / "fast" / "log.jsonl")) < 100


class TwoRanks(SimpleNamespace):
    """An engine whose other rank has twice the vision work, and waited longer."""

    device = torch.device("cpu")

    def counts_of_ranks(self, *counts: int) -> list[list[int]]:
        other = list(counts)
        other[9] *= 3
        other[10], other[11], other[12] = counts[10] + 4000 * (counts[10] > 0), counts[11] + 7000, counts[12] + 2**30
        return [list(counts), other]


def test_ranks_are_summed_and_the_slowest_named() -> None:
    model = tiny_vlm().train().requires_grad_(False)
    model.connector.requires_grad_(True)
    meter = StepMeter(model, MeterConfig(peak_tflops=1.0), "float32")
    batch = packed()
    with meter.flops.forward():
        model(batch)
    fields = meter.fields(TwoRanks(), [batch], time.perf_counter() - 1.0)  # type: ignore[arg-type]
    assert (fields["tokens"], fields["visual_tokens"], fields["samples"]) == (18, 8, 4)
    assert fields["vision_spread"] == pytest.approx(3 / 2 - 1)
    assert fields["vision_max_ms"] - fields["vision_ms"] == pytest.approx(2.0)
    assert fields["wait_ms"] == pytest.approx(7.0)
    assert fields["memory_gib"] == pytest.approx(1 + peak_memory(torch.device("cpu")) / 2**30, rel=0.2)
    assert fields["mfu"] == pytest.approx(fields["model_tflop"] / (2 * fields["step_ms"] / 1000))
    meter.flops.close()


def test_a_model_without_vision_has_none() -> None:
    meter = StepMeter(nn.Linear(2, 2), MeterConfig(), "float32")
    batch = SimpleNamespace(input_ids=torch.arange(3), num_targets=1, ids=["a"])
    fields = meter.fields(TwoRanks(), [batch], time.perf_counter())  # type: ignore[arg-type]
    assert fields["visual_tokens"] == 0
    assert [fields[name] for name in ("pixel_waste", "vision_spread", "vision_ms")] == [None] * 3
    assert StepRecord(step=1, loss=1.0, lr=1.0, targets=1, grad_norm=1.0, **fields).mfu is None
