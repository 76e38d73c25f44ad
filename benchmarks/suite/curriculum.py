"""Curriculum against shuffled on the demo's data: python benchmarks/suite/curriculum.py [key=value ...]

After the demo's first stage, tasks are taught by the transfer matrix' order (`growing` phases), by its reverse, and
shuffled: the same weights at the start, as many samples of each task (rounded to draws), one stage with one optimizer
and one rate schedule, so that the order is all that differs. Writes benchmarks/results/<device>/curriculum.json with
the held-out losses of each seed, whichever wins.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastmllm.curriculum import held_out_losses, transfer_of
from fastmllm.data.build import Splits
from fastmllm.data.phases import Phase, ends_of, exposure, growing
from fastmllm.models.vlm import VLM
from fastmllm.recipe import Recipe
from fastmllm.run import train_stage
from fastmllm.session import Session, environment, write_text
from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig

ROOT = Path(__file__).parents[2]
TASKS = ("name", "group", "exists", "count", "position")
STEPS, ALONE, LIMIT, SEEDS = 120, 30, 96, (0, 1)
BUDGET = ("stages.0.steps=100", "eval.gallery=0")


def compare(
    model: VLM, splits: Splits, stage: StageConfig, engine: EngineConfig, out: Path, *, tasks: Sequence[str] = TASKS,
    steps: int = STEPS, alone: int = ALONE, limit: int = LIMIT, seeds: Sequence[int] = SEEDS,
    console: Console | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the transfer matrix, then train every order with every seed from the same weights.

    Returns:
        The matrix, the order, and a row for each order and seed with the held-out loss of each task, nats a token.
    """
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    found = transfer_of(model, splits, stage, engine, tasks, out / "alone", steps=alone, limit=limit, console=console)
    phases = growing(found.order())
    arms: dict[str, tuple[Phase, ...]] = {
        "curriculum": phases,
        "shuffled": (Phase(share=1.0, mixture=exposure(phases)),),
        "reverse": _same_exposure(growing(found.order()[::-1]), exposure(phases)),
    }
    for parts in arms.values():
        ends_of(parts, steps)  # before hours go into the arms that have a step for each phase
    rows = []
    for seed in seeds:
        for arm, parts in arms.items():
            model.load_state_dict(start)
            taught = replace(
                stage, name=f"{arm}-{seed}", steps=steps, warmup=min(stage.warmup, steps // 5), seed=seed,
                mixture={}, phases=parts,
            )  # fmt: skip
            result = train_stage(model, splits, taught, engine, out / "arms", on_mismatch="fresh", console=console)
            losses = held_out_losses(model, splits.eval, tasks, limit=limit)
            mean = sum(losses.values()) / len(losses)
            rows.append({"order": arm, "seed": seed, "losses": losses, "mean": mean, "train_s": result.seconds})
    model.load_state_dict(start)
    return {"tasks": list(tasks), "gain": found.gain().tolist(), "order": list(found.order()), "rows": rows}


def _same_exposure(phases: Sequence[Phase], wanted: dict[str, float]) -> tuple[Phase, ...]:
    """Return phases whose lengths and mixtures teach each task as often as `wanted` says, new tasks in their order.

    Phase k teaches task k first; what a task still lacks is spread over its own and all later phases evenly.
    """
    order = [next(reversed(phase.mixture)) for phase in phases]
    parts: list[dict[str, float]] = [{} for _ in order]
    for number, task in enumerate(order):
        for later in range(number, len(order)):
            parts[later][task] = wanted[task] / (len(order) - number)
    return tuple(Phase(share=sum(part.values()), mixture=part) for part in parts)


def table(found: dict[str, Any]) -> Table:
    """Show the held-out losses, mean of the seeds."""
    out = Table(title=f"held-out nats a token; taught in the order {', '.join(found['order'])}")
    for name in ("order", *found["tasks"], "mean"):
        out.add_column(name)
    for arm in dict.fromkeys(row["order"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["order"] == arm]
        each = [sum(row["losses"][task] for row in rows) / len(rows) for task in found["tasks"]]
        out.add_row(arm, *(f"{value:.3f}" for value in (*each, sum(each) / len(each))))
    return out


def main() -> None:
    recipe = Recipe.load(ROOT / "recipes" / "emoji.yaml", [*BUDGET, *sys.argv[1:]])
    session = Session(replace(recipe, stages=recipe.stages[:1]), ROOT / "out" / "curriculum")
    session.train()
    assert isinstance(session.model, VLM)
    stage = replace(recipe.stages[1], visual_tokens=())
    found = compare(session.model, session.splits, stage, recipe.engine, session.out, console=session.console)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = ROOT / "benchmarks" / "results" / device / "curriculum.json"
    write_text(path, json.dumps({"environment": environment(), **found}, indent=1, default=str))
    session.console.print(table(found))
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
