"""Figures reach TensorBoard and the services, once a step, and no sink stops a training."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from train_toy import toy, trainer

from fastmllm.train import sinks
from fastmllm.train.meters import MeterConfig, read_log


class Run:
    """What wandb and trackio have of a run."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.fails_at = 0

    def init(self, **options: Any) -> Run:
        self.begun.append(options)
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("no network")
        self.logged.append((step, figures))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Run]:
    run, module = Run(), ModuleType(request.param)
    module.init = run.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.setattr(sinks, "find_spec", lambda name: module)
    return request.param, run


class Stop(Exception):
    pass


def stop_after(step: int) -> Any:
    def on_step(record: Any) -> None:
        if record.step == step:
            raise Stop

    return on_step


def test_a_service_gets_every_step_once(service: tuple[str, Run], tmp_path: Path) -> None:
    name, run = service
    options: dict[str, Any] = {"engine": {"meters": MeterConfig(log=(name,))}, "save_every": 2}
    with pytest.raises(Stop):
        trainer(tmp_path, toy(), on_step=stop_after(5), **options).run()
    trainer(tmp_path, toy(), **options).run()
    assert [step for step, _ in run.logged] == [1, 2, 3, 4, 5, 6]
    records = read_log(tmp_path / "log.jsonl")
    assert run.logged[-1][1] == records[-1].figures()
    assert run.logged[0][1]["loss"] == records[0].loss
    assert run.logged[0][1]["tokens_per_s"] == pytest.approx(1000 * 6 / run.logged[0][1]["step_ms"])
    assert run.begun[0] == run.begun[1]
    assert run.finished == 2


def test_a_sink_that_fails_is_named_once(
    service: tuple[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, run = service
    run.fails_at = 3
    trainer(tmp_path, toy(), engine={"meters": MeterConfig(log=(name,))}).run()
    assert [step for step, _ in run.logged] == [1, 2]
    assert len(read_log(tmp_path / "log.jsonl")) == 6
    said = capsys.readouterr().err
    assert said.count(f"{name} gets no more figures (ConnectionError: no network); training goes on") == 1


def test_a_service_that_does_not_begin_stops_nothing(
    service: tuple[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = service

    def refuse(**_: Any) -> None:
        raise PermissionError("not logged in")

    monkeypatch.setattr(sys.modules[name], "init", refuse)
    trainer(tmp_path, toy(), engine={"meters": MeterConfig(log=(name,))}).run()
    assert capsys.readouterr().err.count("not logged in") == 1


def test_what_is_not_installed_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"meters\.log names wandb, which is not installed: pip install wandb"):
        trainer(tmp_path, toy(), engine={"meters": MeterConfig(log=("wandb",))})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"log": ("wandbb",)}, "log names wandbb; choose of tensorboard, wandb, trackio"),
        ({"log": ("wandb", "wandb")}, "names a sink twice"),
        ({"peak_tflops": 0.0}, "must be positive"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeterConfig(**options)


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options: dict[str, Any] = {"engine": {"meters": MeterConfig(log=("tensorboard",))}, "save_every": 2}
    with pytest.raises(Stop):
        trainer(tmp_path, toy(), on_step=stop_after(5), **options).run()
    trainer(tmp_path, toy(), **options).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in losses] == pytest.approx([r.loss for r in read_log(tmp_path / "log.jsonl")])
    assert {"tokens_per_s", "model_tflop", "memory_gib", "wait"} <= set(events.Tags()["scalars"])
