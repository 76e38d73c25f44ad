"""Two evaluations answer by answer: McNemar's test and a paired bootstrap over images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from fastmllm.eval.intervals import Estimate, statistic
from fastmllm.eval.report import MODEL


@dataclass(frozen=True, slots=True)
class Paired:
    """Two runs on one task's common questions.

    Args:
        task: its name.
        count: questions that both answered.
        a, b: mean verdicts.
        difference: b - a with its 95 % interval, a bootstrap over images.
        only_a, only_b: questions that only one of them has right; 0 where verdicts are no yes or no.
        p: McNemar's exact two-sided p of those; None where verdicts are scores (CIDEr-D): the interval speaks.
        unpaired: questions of one run alone, which are left out.
    """

    task: str
    count: int
    a: float
    b: float
    difference: Estimate
    only_a: int
    only_b: int
    p: float | None
    unpaired: int


@dataclass(slots=True)
class Comparison:
    """All tasks that both runs have, and what could not be compared."""

    tasks: list[Paired] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the answers of a run.

    Args:
        path: a run's folder, or its evaluation.json.

    Raises:
        ValueError: no evaluation is there, or it is damaged.
    """
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        records = stored["value"]["records"]
        for record in records:
            _key(record), float(record["verdict"]), record["condition"], record["answer"]
    except OSError as error:
        raise ValueError(f"{file}: no evaluation there ({error}); run fastmllm eval with --out first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: no evaluation of this version ({error!r}); run fastmllm eval again") from error
    return records


def compare_runs(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], condition: str = MODEL, seed: int = 0
) -> Comparison:
    """Pair two runs' answers by task and id, never by their order.

    Args:
        a, b: records of a `Report`.
        condition: whose answers.
        seed: of the bootstrap.

    Returns:
        a line a task; listed are tasks of one run alone, and questions whose expected answer differs, which are not
        paired: they are other questions.

    Raises:
        ValueError: no common question.
    """
    sides = [_by_task(records, condition) for records in (a, b)]
    found = Comparison()
    for task in dict.fromkeys((*sides[0], *sides[1])):
        first, second = (side.get(task, {}) for side in sides)
        common = [i for i in first if i in second]
        changed = [i for i in common if first[i]["answer"] != second[i]["answer"]]
        found.left_out += [f"{task}: {i}: the expected answers differ" for i in changed]
        same = [i for i in common if i not in set(changed)]
        if not same:
            found.left_out.append(f"{task}: no common question")
            continue
        unpaired = len(first) + len(second) - 2 * len(same)
        found.tasks.append(_pair(task, [first[i] for i in same], [second[i] for i in same], unpaired, seed))
    if not found.tasks:
        raise ValueError("eval compare: the runs have no question in common; evaluate both on the same data")
    return found


def _pair(task: str, a: Sequence[Mapping], b: Sequence[Mapping], unpaired: int, seed: int) -> Paired:
    mine, theirs = [float(r["verdict"]) for r in a], [float(r["verdict"]) for r in b]
    n = len(mine)
    difference = statistic(
        [{"d": y - x, "n": 1.0} for x, y in zip(mine, theirs, strict=True)],
        lambda sums: sums["d"] / sums["n"] if sums["n"] else 0.0,
        [r.get("image") or r["id"] for r in a],
        seed,
    )
    binary = {*mine, *theirs} <= {0.0, 1.0}
    only_a = sum(x > y for x, y in zip(mine, theirs, strict=True)) if binary else 0
    only_b = sum(x < y for x, y in zip(mine, theirs, strict=True)) if binary else 0
    p = mcnemar(only_a, only_b) if binary else None
    return Paired(task, n, sum(mine) / n, sum(theirs) / n, difference, only_a, only_b, p, unpaired)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return McNemar's exact two-sided p: a fair coin for each question that only one run has right.

    Questions about one image are not independent; the interval over images beside it is the safer one.
    """
    n, few = only_a + only_b, min(only_a, only_b)
    log_half = n * math.log(0.5)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + log_half) for k in range(few + 1)
    )
    return min(1.0, 2 * tail)


def comparison_table(found: Comparison, a: str, b: str) -> Table:
    """Return a rich table: a line a task, and below it what was left out."""
    table = Table(title=f"a: {a}\nb: {b}", caption="\n".join(found.left_out) or None)
    for name in ("task", "n", "a", "b", "b - a, 95 %", "only a", "only b", "McNemar p", "unpaired"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in found.tasks:
        d = row.difference
        table.add_row(
            row.task, str(row.count), f"{row.a:.3f}", f"{row.b:.3f}", f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]",
            str(row.only_a), str(row.only_b), "-" if row.p is None else f"{row.p:.2g}", str(row.unpaired),
        )  # fmt: skip
    return table


def _by_task(records: Sequence[Mapping[str, Any]], condition: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    tasks: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        if record["condition"] == condition:
            task, id = _key(record)
            tasks.setdefault(task, {})[id] = record
    return tasks


def _key(record: Mapping[str, Any]) -> tuple[str, str]:
    return str(record["task"]), str(record["id"])
