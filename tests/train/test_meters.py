from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fastmllm.train.meters import MeterLog, ProgressReport, StepRecord, read_log


def record(step: int) -> StepRecord:
    return StepRecord(step=step, loss=1 / step, lr=1e-3, tokens=10, targets=5, step_ms=2.0, grad_norm=1.0)


def test_a_log_continues_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = MeterLog(path)
    for step in range(1, 6):
        log.write(record(step))
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # a kill
    assert [each.step for each in read_log(path)] == [1, 2, 3, 4, 5]
    log = MeterLog(path, first_step=4)
    log.write(record(4))
    log.close()
    assert read_log(path) == [record(step) for step in range(1, 5)]


def test_a_full_disk_stops_the_log_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MeterLog(tmp_path / "log.jsonl")
    log._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    for step in (1, 2):
        log.write(record(step))
    log.close()
    assert capsys.readouterr().err.count("training goes on") == 1


def test_a_terminal_gets_a_bar_and_a_quiet_rank_nothing() -> None:
    for quiet in (False, True):
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        with ProgressReport(console, "toy", start=0, steps=3, quiet=quiet) as progress:
            for step in (1, 2, 3):
                progress.update(record(step))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("3/3" in text) != quiet
