"""Judge the stored answers of runs, and show who wins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from rich.table import Table

from fastmllm.data.cache import atomic_path
from fastmllm.eval.answers import AnswerLog
from fastmllm.eval.bradley_terry import ratings
from fastmllm.eval.compare import read_records
from fastmllm.eval.intervals import Estimate
from fastmllm.eval.judge import Judge
from fastmllm.eval.pairwise import Verdicts, judge_pairs, length_controlled, win_rate
from fastmllm.eval.report import MODEL


@dataclass(frozen=True, slots=True)
class Standing:
    """What a judge made of some runs.

    Args:
        verdicts: every pair and reply.
        ratings: model -> Bradley-Terry rating on Elo's scale; only of models with a verdict.
        wins, controlled: "a > b" -> how often a wins, and would win with answers of b's length.
    """

    verdicts: Verdicts
    ratings: dict[str, Estimate]
    wins: dict[str, Estimate]
    controlled: dict[str, Estimate]


def judge_runs(runs: Sequence[Path], task: str, judge: Judge, name: str, out: Path) -> Standing:
    """Judge what runs said in a task, and write judged.json.

    Args:
        runs: folders of runs, or their evaluation.json.
        task: whose answers of the model (not of its controls) are judged; the expected answer is the reference.
        judge, name: see `judge_pairs`.
        out: folder of the replies, which a second call uses again, and of judged.json.

    Raises:
        ValueError: a run has no answers of this task, or is named twice.
    """
    answers: dict[str, dict[str, str]] = {}
    questions: dict[str, str] = {}
    references: dict[str, str] = {}
    for run in runs:
        kept = [r for r in read_records(run) if (r["task"], r["condition"]) == (task, MODEL)]
        if not kept or str(run) in answers:
            known = sorted({r["task"] for r in read_records(run)})
            raise ValueError(
                f"eval judge: {run}: named twice, or without answers of {task!r}; it has {', '.join(known)}"
            )
        answers[str(run)] = {r["id"]: r["said"] for r in kept if r["said"] is not None}
        questions |= {r["id"]: r.get("prompt", "") for r in kept}
        references |= {r["id"]: r["answer"] for r in kept}
    log = AnswerLog(out / "replies", block=1, retry=True)
    verdicts = judge_pairs(answers, questions, judge, name, references=references, log=log)
    pairs = list(combinations(answers, 2))
    standing = Standing(
        verdicts, ratings(verdicts.games()),
        {f"{a} > {b}": win_rate(verdicts.judged, a, b) for a, b in pairs},
        {f"{a} > {b}": length_controlled(verdicts.judged, a, b) for a, b in pairs},
    )  # fmt: skip
    with atomic_path(out / "judged.json") as temporary:
        temporary.write_text(json.dumps(asdict(standing), indent=1), encoding="utf-8")
    return standing


def verdicts_table(standing: Standing) -> Table:
    """Return a rich table: a line a pair, and below it the ratings and what had no verdict."""
    verdicts = standing.verdicts
    lines = [f"{n}: {e.value:.0f} [{e.low:.0f}, {e.high:.0f}]" for n, e in standing.ratings.items()]
    lines += [f"no verdict: {100 * verdicts.unparsed:.1f} %, turned by the order: {100 * verdicts.flipped:.1f} %"]
    lines += [f"not judged, since a run has no answer: {len(verdicts.left_out)}"] if verdicts.left_out else []
    lines += [f"no reply: {f['error']}" for f in verdicts.failures[:3]]
    table = Table(title="Wins, %, ties as half, 95 %", caption="\n".join(lines))
    for name in ("pair", "n", "wins", "at equal length"):
        table.add_column(name, justify="left" if name == "pair" else "right")
    for pair, won in standing.wins.items():
        cells = [
            f"{100 * e.value:.0f} [{100 * e.low:.0f}, {100 * e.high:.0f}]" for e in (won, standing.controlled[pair])
        ]
        table.add_row(pair, str(won.count), *cells)
    return table
