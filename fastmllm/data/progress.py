"""Say what is going on: a bar where the work can be counted, a spinner where it cannot, a line without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")

DELAY_S = 2.0


def bar(console: Console, *extra: ProgressColumn) -> Progress:
    """Return the bar that all parts draw: description, bar, count, `extra`, time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *extra, TimeRemainingColumn())
    return Progress(*columns, console=console)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, drawing a bar on stderr once `DELAY_S` seconds have passed.

    Args:
        items: what to go through.
        description: what is being done, for the bar's label.
        total: number of items; None = not known.
    """
    started = time.monotonic()
    shown: Progress | None = None
    task = None
    try:
        for done, item in enumerate(items):
            if shown is None and time.monotonic() - started > DELAY_S:
                shown = bar(Console(stderr=True))
                shown.start()
                task = shown.add_task(description, total=total, completed=done)
            yield item
            if shown is not None and task is not None:
                shown.advance(task)
    finally:
        if shown is not None:
            shown.stop()


@contextmanager
def progress_bar(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    """Give a callback (done, total) that draws a bar on a terminal; elsewhere a line is printed at either end."""
    if not console.is_terminal:
        start = time.perf_counter()
        console.print(f"{label} ...", highlight=False)
        yield lambda done, total: None
        console.print(f"{label}: {time.perf_counter() - start:.1f} s")
        return
    with bar(console) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def waiting(what: str, console: Console | None = None) -> Iterator[None]:
    """Say what is waited for while it cannot be counted: a spinner on a terminal, a line elsewhere.

    Args:
        what: "fetching noto 1.2.9 with npm".
        console: where it goes; stderr by default.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{what} ...", highlight=False, soft_wrap=True)
        yield
        return
    with console.status(what):
        yield
