"""A progress bar that appears only when the work takes longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

DELAY_S = 2.0


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items`, drawing a bar on stderr once `DELAY_S` seconds have passed.

    Args:
        items: what to go through.
        description: what is being done, for the bar's label.
        total: number of items.
    """
    from rich.console import Console
    from rich.progress import Progress

    started = time.monotonic()
    bar: Progress | None = None
    task = None
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - started > DELAY_S:
                bar = Progress(console=Console(stderr=True), transient=False)
                bar.start()
                task = bar.add_task(description, total=total, completed=done)
            yield item
            if bar is not None and task is not None:
                bar.advance(task)
    finally:
        if bar is not None:
            bar.stop()
