"""Where a run's figures go besides log.jsonl: TensorBoard, wandb, trackio."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # sink -> what it needs


class Sink(Protocol):
    """A place for figures."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step, from 1."""

    def close(self) -> None:
        """End the run."""


class TensorBoard:
    """Event files under `folder`/tensorboard; a resumed run takes back the steps that it does again."""

    def __init__(self, folder: Path, name: str, run: str, first_step: int) -> None:
        writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a scalar for each figure."""
        for figure, value in figures.items():
            self._writer.add_scalar(figure, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Service:
    """wandb, or trackio, which has its interface; login and project are those of its own variables (WANDB_PROJECT).

    A run goes on under its name; steps that it has are not sent again.
    """

    def __init__(self, package: str, folder: Path, name: str, run: str, first_step: int) -> None:
        self._module = importlib.import_module(package)
        named = {"id": run, "name": name, "dir": str(folder)} if package == "wandb" else {"name": f"{name}-{run}"}
        project = os.environ.get(f"{package.upper()}_PROJECT", "fastmllm")
        self._run = self._module.init(**{"project": project, "resume": "allow", **named})

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of a step."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def check_sinks(names: Sequence[str]) -> None:
    """Look whether what the sinks need is there, before anything long begins.

    Raises:
        ImportError: it is not; says how to install it.
    """
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise ImportError(
                f"meters.log names {name}, which is not installed: pip install {PACKAGES[name]}, or leave it out "
                "(log.jsonl is always written)"
            )


class Sinks:
    """All sinks of a run; one that fails is named once and left out from then on, and training goes on.

    Args:
        names: keys of `PACKAGES`.
        folder: of the stage.
        name: of the stage.
        run: names this run, the same when it is resumed.
        first_step: that is written now.
        seen: the last step that was written before; a service does not get it again.
    """

    def __init__(self, names: Sequence[str], folder: Path, name: str, run: str, first_step: int, seen: int) -> None:
        self._open: dict[str, Sink] = {}
        self._seen = seen
        for sink in names:
            self._guard(sink, lambda sink=sink: self._open.update({sink: _make(sink, folder, name, run, first_step)}))  # type: ignore[misc]

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Give the figures of a step to every sink."""
        for name, sink in list(self._open.items()):
            if step > self._seen or isinstance(sink, TensorBoard):
                self._guard(name, lambda sink=sink: sink.write(step, figures))  # type: ignore[misc]

    def close(self) -> None:
        """Close every sink."""
        for name, sink in list(self._open.items()):
            self._guard(name, sink.close)
        self._open = {}

    def _guard(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # whatever a service does, the training is worth more
            broken = self._open.pop(name, None)
            print(f"{name} gets no more figures ({type(error).__name__}: {error}); training goes on", file=sys.stderr)
            if broken is not None:
                with suppress(Exception):
                    broken.close()


def _make(sink: str, folder: Path, name: str, run: str, first_step: int) -> Sink:
    if sink == "tensorboard":
        return TensorBoard(folder, name, run, first_step)
    return Service(sink, folder, name, run, first_step)
