"""What a set gives away without a model: majority, random, and an answer by the words of the question alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from fastmllm.eval import controls
from fastmllm.eval.intervals import Estimate
from fastmllm.eval.sets import Loaded

WORDS = "words alone"
LINES = (controls.MAJORITY, controls.RANDOM, WORDS)


@dataclass(frozen=True, slots=True)
class Baseline:
    """One score of an answer that looks at no image."""

    task: str
    line: str
    metric: str
    estimate: Estimate


def baselines(sets: Sequence[Loaded], limit: int = 0, seed: int = 0) -> list[Baseline]:
    """Score every task's answers of `LINES` with the task's own parser and metrics.

    Args:
        sets: of `load_sets`, with or without images.
        limit: as `EvalConfig.limit`.
        seed: of the random answers, the ties and the halves.
    """
    rows = []
    for task in (task for loaded in sets for task in loaded.tasks):
        items = controls.limited(task.samples(), limit, seed)
        if not items:
            continue
        closed = task.closed or sorted({s.answer for s in task.train or items})
        for line, texts in zip(
            LINES,
            (
                controls.majority_answer(items, task.train, seed),
                controls.random_answer(items, closed, seed),
                controls.words_answer(items, seed),
            ),
            strict=True,
        ):
            scored = task.scored(texts, items)
            rows += [Baseline(task.name, line, name, metric(scored, seed)) for name, metric in task.metrics.items()]
    return rows


def baselines_table(rows: Sequence[Baseline]) -> Table:
    """Return a rich table: a line a task and metric."""
    table = Table(title="Without a model: % and 95 % interval (CIDEr-D is a score)")
    for name in ("task", "metric", "n", *LINES):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    found = {(r.task, r.metric, r.line): r.estimate for r in rows}
    for task, metric in dict.fromkeys((r.task, r.metric) for r in rows):
        scale = 1 if metric == "CIDEr-D" else 100
        cells = [found[task, metric, line] for line in LINES]
        shown = [f"{scale * e.value:.1f} [{scale * e.low:.1f}, {scale * e.high:.1f}]" for e in cells]
        table.add_row(task, metric, str(cells[0].count), *shown)
    return table
