"""Rows and records of an evaluation, and the table that shows each score beside its controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from fastmllm.eval import controls
from fastmllm.eval.intervals import Estimate

MODEL = "model"
PLAIN = ("CIDEr-D", "words")  # no shares
CONDITIONS = (MODEL, controls.BLIND, controls.WRONG, controls.MAJORITY, controls.RANDOM)


@dataclass(frozen=True, slots=True)
class Row:
    """One score: a task, who answered, the metric, its value with a 95 % interval, and the share it could not parse."""

    task: str
    condition: str
    metric: str
    estimate: Estimate
    unparsed: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Report:
    """All rows, a record for each answer, and what could not be asked, with the reason."""

    rows: list[Row] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def get(self, task: str, condition: str = MODEL, metric: str | None = None) -> Row:
        """Return a row; the task's first metric unless one is named."""
        for row in self.rows:
            if (row.task, row.condition) == (task, condition) and metric in (None, row.metric):
                return row
        raise KeyError(f"no row {task} / {condition} / {metric}; tasks: {sorted({r.task for r in self.rows})}")

    def beats_controls(self, task: str) -> bool:
        """Tell whether the model's interval lies wholly above the intervals of all controls."""
        mine = self.get(task).estimate
        return all(mine.above(self.get(task, c).estimate) for c in CONDITIONS[1:])

    def to_json(self) -> list[dict[str, Any]]:
        return [r.to_json() for r in self.rows]

    def table(self) -> Table:
        """Return a rich table: a line a task and metric, a column a condition; unparsed shares in their order."""
        table = Table(title="Evaluation: % and 95 % interval (CIDEr-D is a score; less CHAIR is better)")
        for name in ("task", "metric", "n", *CONDITIONS, "unparsed, %"):
            table.add_column(name, justify="left" if name in ("task", "metric") else "right")
        for task, metric in dict.fromkeys((r.task, r.metric) for r in self.rows):
            cells = {r.condition: r for r in self.rows if (r.task, r.metric) == (task, metric)}
            mine = cells[MODEL]
            table.add_row(
                task,
                metric,
                str(mine.estimate.count),
                *(_cell(cells[c].estimate, metric) if c in cells else "-" for c in CONDITIONS),
                unparsed(cells) or "-",
            )
        return table


def unparsed(row: Mapping[str, Row]) -> str:
    """Return the unparsed shares of a line of the table, in the order of `CONDITIONS`: "3 / 0 / 1 / 0 / 0"."""
    shares = [row[c].unparsed for c in CONDITIONS if c in row]
    return (
        " / ".join("-" if s is None else f"{100 * s:.0f}" for s in shares) if any(s is not None for s in shares) else ""
    )


def _cell(e: Estimate, metric: str) -> str:
    if metric in PLAIN:
        return f"{e.value:.1f} {e.low:.1f}-{e.high:.1f}"
    return f"{100 * e.value:.0f} {100 * e.low:.0f}-{100 * e.high:.0f}"
