"""The commands below `fastmllm eval`: {compare, judge, baselines}; none of them loads a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

RunPath = Annotated[Path, tyro.conf.Positional]


def compare(a: RunPath, b: RunPath, json: bool = False) -> None:
    """Compare two evaluations answer by answer: fastmllm eval compare A B.

    Args:
        a: folder of a run, or its evaluation.json.
        b: another one, on the same questions.
        json: for programs.
    """
    from fastmllm.eval.compare import compare_runs, comparison_table, read_records

    found = compare_runs(read_records(a), read_records(b))
    if json:
        print(found.to_json())
    else:
        Console().print(comparison_table(found, str(a), str(b)))


def show_baselines(sets: Annotated[tuple[str, ...], tyro.conf.Positional] = (), limit: int = 0, seed: int = 0) -> None:
    """Score published sets without a model: fastmllm eval baselines pope=/data/pope amber=/data/amber.

    Args:
        sets: name=folder, in the authors' format; the images need not be there.
        limit: at most this many questions a task; 0 = all.
        seed: of the random answers.
    """
    from fastmllm.eval.baselines import baselines, baselines_table
    from fastmllm.eval.sets import describe, load_sets

    if not sets or not all("=" in item for item in sets):
        raise ValueError("eval baselines: name a set and its folder, such as pope=/data/pope")
    console = Console(width=None if sys.stdout.isatty() else 140)
    loaded = load_sets(dict(item.split("=", 1) for item in sets), images=False)
    for line in (line for one in loaded for line in describe(one)):
        console.print(line, highlight=False)
    console.print(baselines_table(baselines(loaded, limit, seed)))


def judge(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    task: str,
    out: Path,
    url: str = "",
    model: str = "",
    key_variable: str = "OPENAI_API_KEY",
    human: Path | None = None,
    timeout_s: float = 60.0,
) -> None:
    """Judge the answers of runs in pairs, in both orders: fastmllm eval judge A B --task caption --url … --out DIR.

    Args:
        runs: folders of two or more runs, or their evaluation.json.
        task: whose answers.
        out: folder of the replies and of judged.json; a second call goes on.
        url: an OpenAI-compatible endpoint, such as http://localhost:8000/v1.
        model: its name there.
        key_variable: environment variable that holds its key; empty or unset = none is sent.
        human: in place of an endpoint, a JSONL file in which people write verdicts.
        timeout_s: of one request.
    """
    from fastmllm.eval.judge import Endpoint, HumanFile
    from fastmllm.eval.judge_runs import judge_runs, verdicts_table

    if bool(url and model) == (human is not None):
        raise ValueError("eval judge: give --url and --model of an endpoint, or --human and a file")
    chosen = HumanFile(human) if human else Endpoint(url, model, os.environ.get(key_variable, ""), timeout_s)
    Console().print(verdicts_table(judge_runs(runs, task, chosen, chosen.name, out)))


COMMANDS: dict[str, Callable[..., Any]] = {
    "compare": compare,
    "judge": judge,
    "baselines": show_baselines,
}
