"""What a run reports: one JSON line a step, and a progress bar or plain lines for the reader."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, TextColumn

from fastmllm.data.progress import bar
from fastmllm.train.checkpoint import atomic_file


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """Hold the figures of one step, over all ranks.

    Args:
        step: counted from 1.
        loss: mean over the step's target tokens, before the update.
        lr: learning rate of the first group.
        tokens, targets: positions, and those with a label.
        step_ms: wall time, batches and reading included.
        grad_norm: global norm before clipping.
        reward: mean over the answers that were sampled; None where none are.
    """

    step: int
    loss: float
    lr: float
    tokens: int
    targets: int
    step_ms: float
    grad_norm: float
    reward: float | None = None


class MeterLog:
    """Append step records to a JSON-lines file; a disk that is full stops the log, not the training."""

    def __init__(self, path: Path, *, first_step: int = 1) -> None:
        """Open the log, dropping lines of first_step and later (a resumed run writes them again)."""
        kept = [line + "\n" for line in _lines(path) if json.loads(line)["step"] < first_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text(encoding="utf-8") != "".join(kept):
            with atomic_file(path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._path, self._broken = path, False

    def write(self, record: StepRecord) -> None:
        """Append one line."""
        if self._broken:
            return
        try:
            self._file.write(json.dumps(asdict(record)) + "\n")
        except OSError as error:
            self._broken = True
            print(f"log {self._path} stops here: {error.strerror}; training goes on", file=sys.stderr)

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError:
            if not self._broken:
                raise


def read_log(path: Path) -> list[StepRecord]:
    """Read the step records of a run; a line cut short by a kill ends the list."""
    return [StepRecord(**json.loads(line)) for line in _lines(path)]


def _lines(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line)
        except json.JSONDecodeError:
            return
        yield line


class ProgressReport:
    """Show a bar on a terminal, about ten plain lines elsewhere, nothing when quiet (ranks other than 0)."""

    def __init__(self, console: Console, title: str, *, start: int, steps: int, quiet: bool) -> None:
        self._console, self._title, self._steps, self._quiet = console, title, steps, quiet
        self._start, self._began = start, time.perf_counter()
        self._every = max(1, steps // 10)
        self._bar: Progress | None = None
        if not quiet and console.is_terminal:
            self._bar = bar(console, TextColumn("{task.fields[figures]}"))
            self._task = self._bar.add_task(title, total=steps, completed=start, figures="")

    def __enter__(self) -> ProgressReport:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, record: StepRecord) -> None:
        """Show a step."""
        if self._quiet:
            return
        figures = f"loss {record.loss:.3f}  {record.step_ms:.0f} ms/step"
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, figures=figures)
        elif record.step == self._start + 1 or record.step % self._every == 0 or record.step == self._steps:
            left = (time.perf_counter() - self._began) / (record.step - self._start) * (self._steps - record.step)
            self._console.print(
                f"{self._title}  step {record.step}/{self._steps}  {figures}  about {left:.0f} s left", highlight=False
            )
