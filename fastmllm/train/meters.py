"""What a run reports: one JSON line a step, and a progress bar or plain lines and a table for the reader."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from fastmllm.data.progress import bar
from fastmllm.train.checkpoint import atomic_file
from fastmllm.train.sinks import PACKAGES


@dataclass(frozen=True, kw_only=True, slots=True)
class MeterConfig:
    """Say where figures go besides the console and log.jsonl, and what MFU is a share of.

    Args:
        log: any of "tensorboard", "wandb", "trackio"; what is named must be installed.
        peak_tflops: of one rank's device in the dtype of the products; None takes that of the table (`peaks`), and
            leaves MFU out where the device is not there, such as a CPU.
    """

    log: tuple[str, ...] = ()
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.log if name not in PACKAGES]:
            raise ValueError(
                f"meters: log names {', '.join(unknown)}; choose of {', '.join(PACKAGES)} (log.jsonl is always written)"
            )
        if len(set(self.log)) < len(self.log):
            raise ValueError(f"meters: log names a sink twice: {', '.join(self.log)}")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(
                f"meters: peak_tflops ({self.peak_tflops}) must be positive; leave it out to take the table's"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """Hold the figures of one step, over all ranks; what an older log does not have is None.

    Args:
        step: counted from 1.
        loss: mean over the step's target tokens, before the update.
        lr: learning rate of the first group.
        tokens, targets: positions, and those with a label.
        step_ms: wall time, batches and reading included.
        grad_norm: global norm before clipping.
        reward: mean over the answers that were sampled; None where none are.
        reward_chosen, reward_rejected: beta * (policy - reference) of a pair's answers, means over the step's pairs.
        margin: by how much the chosen answer's is larger.
        accuracy: share of the pairs in which it is.
        visual_tokens: of the positions, those of images; with those beside the text that layers look across to.
        samples: sequences: of pairs each answer, of sampled answers each.
        padding: share of the positions from which nothing can be learned: padding, and micro-batches without a target.
        unfilled: share of the positions of `max_tokens` that no sample fitted into; None without such a budget.
        pixel_waste: share of the encoder's pixels that show nothing more of a picture; None where nobody planned them.
        wait_ms: the longest that a rank stood waiting for its batches.
        vision_ms, vision_max_ms: of the vision module's forward passes, mean of the ranks and the slowest.
        vision_spread: by how much the rank with the most vision operations is above the mean; 0 = all have as many. The
            three are None where no image was encoded.
        memory_gib: the most that a rank held so far: tensors on a GPU, the process on a CPU.
        model_tflop: operations that the step needs, 10^12.
        hardware_tflop: operations that were done, with those that were computed again.
        mfu, hfu: the two as shares of what the devices promise in that time; None where their peak is not known.
    """

    step: int
    loss: float
    lr: float
    tokens: int
    targets: int
    step_ms: float
    grad_norm: float
    reward: float | None = None
    reward_chosen: float | None = None
    reward_rejected: float | None = None
    margin: float | None = None
    accuracy: float | None = None
    visual_tokens: int | None = None
    samples: int | None = None
    padding: float | None = None
    unfilled: float | None = None
    pixel_waste: float | None = None
    wait_ms: float | None = None
    vision_ms: float | None = None
    vision_max_ms: float | None = None
    vision_spread: float | None = None
    memory_gib: float | None = None
    model_tflop: float | None = None
    hardware_tflop: float | None = None
    mfu: float | None = None
    hfu: float | None = None

    def a_second(self, count: int) -> float:
        """Return a count of this step as a rate."""
        return 1000 * count / self.step_ms

    def figures(self) -> dict[str, float]:
        """Return what is known, by name, with rates instead of counts, for a chart."""
        known = {name: value for name, value in asdict(self).items() if value is not None and name != "step"}
        for name in ("tokens", "visual_tokens", "samples"):
            if name in known:
                known[f"{name}_per_s"] = self.a_second(known.pop(name))
        if self.wait_ms is not None:
            known["wait"] = self.wait_ms / self.step_ms
        return known


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
        figures = (
            f"loss {record.loss:.3f}  {record.step_ms:.0f} ms/step  {record.a_second(record.tokens):,.0f} tokens/s"
        )
        if record.mfu is not None:
            figures += f"  MFU {record.mfu:.1%}"
        if record.wait_ms is not None:
            figures += f"  wait {record.wait_ms / record.step_ms:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, figures=figures)
        elif record.step == self._start + 1 or record.step % self._every == 0 or record.step == self._steps:
            left = (time.perf_counter() - self._began) / (record.step - self._start) * (self._steps - record.step)
            self._console.print(
                f"{self._title}  step {record.step}/{self._steps}  {figures}  about {left:.0f} s left", highlight=False
            )


def report_table(records: Sequence[StepRecord], title: str) -> Table:
    """Draw what a stage took: medians over its steps, without the first, which warms up; memory at the most."""
    steady = records[1:] or records
    rows: tuple[tuple[str, Callable[[StepRecord], float | None], str], ...] = (
        ("step, ms", lambda r: r.step_ms, ",.1f"),
        ("tokens/s", lambda r: r.a_second(r.tokens), ",.0f"),
        ("visual tokens/s", lambda r: None if r.visual_tokens is None else r.a_second(r.visual_tokens), ",.0f"),
        ("samples/s", lambda r: None if r.samples is None else r.a_second(r.samples), ",.1f"),
        ("MFU", lambda r: r.mfu, ".1%"),
        ("HFU", lambda r: r.hfu, ".1%"),
        ("TFLOP a step", lambda r: r.model_tflop, ".4g"),
        ("computed again", lambda r: _beyond(r.hardware_tflop, r.model_tflop), ".1%"),
        ("padding", lambda r: r.padding, ".1%"),
        ("budget without samples", lambda r: r.unfilled, ".1%"),
        ("pixels without detail", lambda r: r.pixel_waste, ".1%"),
        ("waiting for batches", lambda r: None if r.wait_ms is None else r.wait_ms / r.step_ms, ".1%"),
        ("vision forward, ms", lambda r: r.vision_ms, ",.1f"),
        ("slowest rank, ms", lambda r: r.vision_max_ms, ",.1f"),
        ("spread of vision work", lambda r: r.vision_spread, ".1%"),
    )
    table = Table(title=title)
    table.add_column("median")
    table.add_column("", justify="right")
    for label, read, form in rows:
        values = [value for record in steady if (value := read(record)) is not None]
        if values:
            table.add_row(label, format(median(values), form))
    if peaks := [record.memory_gib for record in records if record.memory_gib is not None]:
        table.add_row("peak memory, GiB", f"{max(peaks):.2f}")
    return table


def _beyond(done: float | None, needed: float | None) -> float | None:
    return done / needed - 1 if done and needed else None
