from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fastmllm.train.meters import MeterLog, ProgressReport, StepRecord, read_log, report_table


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


def test_a_log_of_before_the_meters_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    line = '{"step": 1, "loss": 2.5, "lr": 0.1, "tokens": 8, "targets": 4, "step_ms": 3.0, "grad_norm": 1.0}'
    path.write_text(line + "\n")
    (old,) = read_log(path)
    assert (old.loss, old.visual_tokens, old.mfu) == (2.5, None, None)
    assert "visual_tokens_per_s" not in old.figures()


def measured(step: int, **changes: float) -> StepRecord:
    return replace(
        record(step), samples=4, visual_tokens=6, wait_ms=0.5, mfu=0.31, hfu=0.42, model_tflop=2.0, hardware_tflop=3.0,
        padding=0.02, vision_spread=0.25, **({"memory_gib": 1.5} | changes),
    )  # fmt: skip


def test_the_line_and_the_table_show_what_is_known() -> None:
    console = Console(file=io.StringIO(), width=160)
    with ProgressReport(console, "toy", start=0, steps=1, quiet=False) as progress:
        progress.update(measured(1))
    console.print(report_table([measured(1, step_ms=900.0), measured(2), measured(3, memory_gib=2.5)], "toy"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "5,000 tokens/s  MFU 31.0%  wait 25%" in text
    table = {" ".join(line.split()[1:-3]): line.split()[-2] for line in text.splitlines() if line.startswith("│")}
    assert table["step, ms"] == "2.0"  # the first step warms up
    assert table["samples/s"] == "2,000.0"
    assert table["visual tokens/s"] == "3,000"
    assert (table["HFU"], table["computed again"], table["padding"]) == ("42.0%", "50.0%", "2.0%")
    assert (table["spread of vision work"], table["peak memory, GiB"]) == ("25.0%", "2.50")
    console = Console(file=io.StringIO(), width=160)
    console.print(report_table([record(1)], "old"))
    assert "HFU" not in console.file.getvalue()  # type: ignore[attr-defined]
