from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from train_toy import ToyBatch, joined, sample, toy, trainer, values

from fastmllm.train.checkpoint import CheckpointError
from fastmllm.train.inventory import latest_checkpoint
from fastmllm.train.meters import StepRecord, read_log
from fastmllm.train.trainer import NonFiniteLossError, TrainingInterrupted

COMBINATIONS = [("float32", 2), ("bfloat16", 2), ("float32", 0), ("float32", 1), ("bfloat16", 3)]


class Stop(Exception):
    pass


def stop_after(step: int, what: BaseException | int) -> Any:
    def on_step(record: StepRecord) -> None:
        if record.step == step:
            if isinstance(what, int):
                os.kill(os.getpid(), what)
            else:
                raise what

    return on_step


def losses(out: Path) -> list[float]:
    return [record.loss for record in read_log(out / "log.jsonl")]


@pytest.mark.parametrize("dtype, zero_stage", COMBINATIONS)
def test_resume_is_bitwise(tmp_path: Path, dtype: str, zero_stage: int) -> None:
    engine = {"dtype": dtype, "zero_stage": zero_stage, "accumulation": 2}
    straight = toy(dropout=0.2)
    trainer(tmp_path / "a", straight, engine=engine).run()
    with pytest.raises(Stop):
        trainer(
            tmp_path / "b", toy(dropout=0.2), engine=engine, save_every=3, on_step=stop_after(5, Stop())
        ).run()  # fmt: skip
    assert len(losses(tmp_path / "b")) == 5
    resumed = toy(dropout=0.2)
    trainer(tmp_path / "b", resumed, engine=engine, save_every=3).run()
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert [record.step for record in read_log(tmp_path / "b" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    for name, value in values(straight).items():
        assert torch.equal(value, values(resumed)[name]), name


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_resume(tmp_path: Path, number: int, code: int) -> None:
    straight, stopped, console = toy(), toy(), Console(file=io.StringIO(), width=200)
    trainer(tmp_path / "a", straight).run()
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted) as raised:
        trainer(tmp_path / "b", stopped, console=console, on_step=stop_after(2, number)).run()
    assert raised.value.code == code
    assert signal.getsignal(number) == before
    assert "after step 2 of 6, saved in" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "run the same again" in console.file.getvalue()  # type: ignore[attr-defined]
    resumed = toy()
    trainer(tmp_path / "b", resumed).run()
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert all(torch.equal(value, values(resumed)[name]) for name, value in values(straight).items())


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """SIGINT raises, as it does but where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_a_second_sigterm_does_not_cut_the_save(tmp_path: Path) -> None:
    def both(record: StepRecord) -> None:
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does after Ctrl-C

    with pytest.raises(TrainingInterrupted) as raised:
        trainer(tmp_path / "a", toy(), on_step=both).run()
    assert raised.value.code == 130
    assert latest_checkpoint(tmp_path / "a" / "checkpoints") is not None

    def twice(record: StepRecord) -> None:
        first = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is first:  # two that wait together would count as one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C acts at once
        trainer(tmp_path / "b", toy(), on_step=twice).run()
    assert latest_checkpoint(tmp_path / "b" / "checkpoints") is None


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_an_error_of_the_model_is_the_one_shown(tmp_path: Path, zero_stage: int) -> None:
    class Fails(type(toy())):  # type: ignore[misc]
        def forward(self, batch: ToyBatch) -> Tensor:
            loss = super().forward(batch)
            if batch.ids == ["sample-3"]:
                raise ZeroDivisionError("in the model")
            return loss

    torch.manual_seed(0)
    model, linear = Fails(), nn.functional.linear
    with pytest.raises(ZeroDivisionError, match="in the model"):
        trainer(tmp_path, model, engine={"zero_stage": zero_stage}).run()
    assert nn.functional.linear is linear
    assert all(param.numel() for param in model.parameters())
    model(sample(0)).backward()


def test_a_finished_stage_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, again = toy(), toy()
    first = trainer(tmp_path, model).run()
    assert not first.reused
    assert first.targets == sum(sample(index).num_targets for index in range(6))
    assert first.tokens == sum(len(sample(index).input_ids) for index in range(6))

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("the engine was made")

    monkeypatch.setattr("fastmllm.train.trainer.create_engine", never)
    second = trainer(tmp_path, again, batches=never, engine={"zero_stage": 3}).run()  # the spread may differ
    assert second.reused
    assert (second.loss_last, second.seconds) == (first.loss_last, first.seconds)
    assert all(torch.equal(value, values(again)[name]) for name, value in values(model).items())
    assert not again.training


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"changes": {"steps": 7}}, r"stage\.steps: 6 -> 7"),
        ({"changes": {"trainable": {"connector.*": 1e-2, "language.blocks.1.*": 2e-3}}}, "trainable"),
        ({"recipe": {"data": "other"}}, r"given\.data: None -> other"),
        ({"engine": {"dtype": "bfloat16"}}, "dtype: float32 -> bfloat16"),
        ({"engine": {"accumulation": 2}}, r"micro_batches: 1 -> 2 \(accumulation times ranks is a step"),
        ({"seed": 1}, "frozen_weights"),
    ],
)
def test_another_recipe_is_never_loaded(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if not (tmp_path / "run").exists():
        with pytest.raises(TrainingInterrupted):
            trainer(tmp_path / "run", toy(), on_step=stop_after(2, signal.SIGTERM)).run()
    model = toy(seed=changes.pop("seed", 0))
    with pytest.raises(CheckpointError, match=message):
        trainer(tmp_path / "run", model, **changes).run()
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is not None
    trainer(tmp_path / "run", model, on_mismatch="fresh", **changes).run()
    assert [record.step for record in read_log(tmp_path / "run" / "log.jsonl")] == list(
        range(1, len(losses(tmp_path / "run")) + 1)
    )
    assert latest_checkpoint(tmp_path / "run.old-1" / "checkpoints") is not None


def test_batch_size_and_accumulation_are_one_thing(tmp_path: Path) -> None:
    """Four samples in one batch, or one by one: the same step, though their target counts differ."""
    results: dict[str, Any] = {}
    for name, accumulation, batches in (
        ("whole", 1, lambda index: joined(*(sample(4 * index + part) for part in range(4)))),
        ("halves", 2, lambda index: joined(*(sample(2 * index + part) for part in range(2)))),
        ("single", 4, sample),
    ):
        model = toy()
        trainer(tmp_path / name, model, engine={"accumulation": accumulation}, batches=batches).run()
        results[name] = (losses(tmp_path / name), values(model))
    counts = {sample(index).num_targets for index in range(4)}
    assert len(counts) > 1  # else a mean of means would pass as well
    for name in ("halves", "single"):
        assert results[name][0] == pytest.approx(results["whole"][0], abs=1e-6, rel=0)
        for key, value in results["whole"][1].items():
            assert torch.allclose(value, results[name][1][key], atol=1e-5), key


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.save, []

    def full(state: Any, path: Any, *args: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) > 1:  # during the second checkpoint
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(state, path, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step-00000004: .*No space left .* step-00000002 is intact"):
        trainer(tmp_path / "b", toy(), save_every=2).run()
    monkeypatch.undo()
    assert not list((tmp_path / "b" / "checkpoints").glob("*.tmp-*"))
    trainer(tmp_path / "a", straight := toy()).run()
    trainer(tmp_path / "b", resumed := toy(), save_every=2).run()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert all(torch.equal(value, values(resumed)[name]) for name, value in values(straight).items())


def test_a_non_finite_loss_names_step_and_samples(tmp_path: Path) -> None:
    class Poisoned(type(toy())):  # type: ignore[misc]
        def forward(self, batch: ToyBatch) -> Tensor:
            loss = super().forward(batch)
            return loss * float("nan") if "sample-9" in batch.ids else loss

    torch.manual_seed(0)
    with pytest.raises(
        NonFiniteLossError, match=r"step 5: the loss is nan; samples sample-9; checkpoint .*00000004 is"
    ):
        trainer(tmp_path, Poisoned(), engine={"accumulation": 2}, save_every=2).run()
    assert len(losses(tmp_path)) == 4


def test_a_non_finite_gradient_is_found(tmp_path: Path) -> None:
    class Root(type(toy())):  # type: ignore[misc]
        def forward(self, batch: ToyBatch) -> Tensor:
            extra = self.connector[0].weight.sub(self.connector[0].weight.detach()).sum().abs().sqrt()
            return super().forward(batch) + 0 * extra  # 0 * sqrt'(0): finite loss, NaN gradient

    for zero_stage in (2, 3):
        with pytest.raises(NonFiniteLossError, match=r"step 1: the loss is finite but its gradient is not; samples"):
            trainer(tmp_path / str(zero_stage), Root(), engine={"zero_stage": zero_stage}).run()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_declared_parameter_that_does_not_learn_is_named(tmp_path: Path, zero_stage: int) -> None:
    model = toy()
    model.language.blocks[1].gate.data.zero_()
    with pytest.raises(RuntimeError, match=r"all-zero gradient: .*language\.blocks\.1\.down\.weight"):
        trainer(tmp_path / "a", model, engine={"zero_stage": zero_stage}).run()
    model = toy()
    model.language.blocks[1].gate.data.zero_()
    allowed = {"may_be_zero": ("language.blocks.1.*",), "steps": 1}
    trainer(tmp_path / "b", model, changes=allowed, engine={"zero_stage": zero_stage}).run()


def test_stages_follow_each_other_on_one_model(tmp_path: Path) -> None:
    """Stage 1 by ZeRO-3, stage 2 by ZeRO-2: the same weights as by ZeRO-2 twice."""
    ends = []
    for first in (3, 2):
        model = toy()
        trainer(
            tmp_path / f"{first}-1", model, changes={"trainable": {"connector.*": 1e-2}}, engine={"zero_stage": first}
        ).run()
        trainer(tmp_path / f"{first}-2", model, engine={"zero_stage": 2}).run()
        ends.append(values(model))
    assert all(torch.allclose(value, ends[1][name], atol=1e-5) for name, value in ends[0].items())


def test_bad_batches_end_in_one_message(tmp_path: Path) -> None:
    def empty(index: int) -> ToyBatch:
        batch = sample(index)
        batch.labels[:] = -100
        batch.num_targets = 0
        return batch

    with pytest.raises(ValueError, match=r"step 1 has no target token; samples sample-0"):
        trainer(tmp_path / "a", toy(), batches=empty).run()

    def missing(index: int) -> ToyBatch:
        raise FileNotFoundError(f"image-{index}.png")

    with pytest.raises(FileNotFoundError, match=r"image-0\.png"):
        trainer(tmp_path / "b", toy(), batches=missing).run()


def test_the_log_and_the_lines(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    result = trainer(tmp_path, toy(), console=console, changes={"steps": 30}).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert set(lines[0]) == {field.name for field in fields(StepRecord)}
    assert (lines[0]["tokens"], lines[0]["samples"], lines[0]["padding"]) == (6, 1, 0)
    assert lines[1]["lr"] == pytest.approx(1e-2)
    assert lines[0]["grad_norm"] > 0
    assert result.loss_last == pytest.approx(sum(line["loss"] for line in lines[-3:]) / 3)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "what learns" in printed
    assert 8 <= printed.count("ms/step") <= 12
    assert len(re.findall(r"\d tokens/s", printed)) == printed.count("ms/step")
    assert printed.index("step 30/30") < printed.index("what it took") < printed.index("peak memory, GiB")
    assert printed.index("what learns") < printed.index("step 1/30")


def test_a_damaged_result_says_what_to_do(tmp_path: Path) -> None:
    trainer(tmp_path, toy()).run()
    (tmp_path / "result.json").write_text('{"result": "\x01')
    with pytest.raises(CheckpointError, match=r"json is damaged \(Invalid control.*; delete .*json and run"):
        trainer(tmp_path, toy()).run()


def test_a_failed_export_repeats_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, model = toy(), toy()
    trainer(tmp_path / "a", straight).run()

    def full(*_: Any, **__: Any) -> None:
        raise CheckpointError("cannot write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastmllm.train.trainer.save_trainable", full)
        with pytest.raises(CheckpointError, match="No space"):
            trainer(tmp_path / "b", model, save_every=4).run()
    steps: list[int] = []
    resumed = toy()
    result = trainer(tmp_path / "b", resumed, save_every=4, on_step=lambda record: steps.append(record.step)).run()
    assert steps == []
    assert (result.steps, result.loss_last) == (6, losses(tmp_path / "a")[-1])
    assert all(torch.equal(value, values(resumed)[name]) for name, value in values(straight).items())
