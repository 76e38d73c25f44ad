"""A recipe and its folder: data, model, training, evaluation and sweep, each made once and reused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fastmllm
from fastmllm.bench.sweep import Cell, cells, sweep
from fastmllm.compression import compress
from fastmllm.data.build import Splits
from fastmllm.data.build import build as build_data
from fastmllm.data.images import open_image
from fastmllm.data.progress import progress_bar
from fastmllm.eval.answers import AnswerLog, Ranks
from fastmllm.eval.intervals import Estimate
from fastmllm.eval.runner import Report, Row, evaluate
from fastmllm.eval.sets import describe, load_sets
from fastmllm.eval.task import Task
from fastmllm.infer.respond import Responder
from fastmllm.models.mllm import MLLM
from fastmllm.models.talk import TalkConfig
from fastmllm.models.vlm import VLM, ModelConfig
from fastmllm.pairs import Learners, format_of
from fastmllm.recipe import Recipe
from fastmllm.run import cache_features, images_of, load_model, questions_of, screen_splits, train_stage
from fastmllm.train.checkpoint import atomic_file, fingerprint
from fastmllm.train.engine import init_ranks, launched_world_size
from fastmllm.train.pairs import PAIR_KINDS
from fastmllm.train.rules import apply_rules
from fastmllm.train.trainer import StageResult


class Session:
    """A recipe and its folder: parts are made on first use and stored, with what was measured while they were made.

    Under a launcher of several ranks all of them train; `first` tells the one that does the rest.

    Args:
        recipe: what to do.
        out: folder of the run.
        console: where progress goes; ranks other than the first are silent.
    """

    def __init__(self, recipe: Recipe, out: Path, console: Console | None = None) -> None:
        self.recipe, self.out = recipe, Path(out)
        self.first = int(os.environ.get("RANK", "0")) == 0
        width = None if sys.stdout.isatty() else 140  # a log is not 80 columns wide
        self.console = (console or Console(width=width)) if self.first else Console(quiet=True)
        self.parts: dict[str, dict[str, Any]] = {}
        self.results: list[StageResult] = []

    @cached_property
    def splits(self) -> Splits:
        with self._part("data", self.recipe.data):
            splits = build_data(self.recipe.data)
        splits = screen_splits(self.model, splits)
        for note in splits.notes:
            self.console.print(f"note: {note}", highlight=False)
        for reason, count in splits.skipped.items():
            self.console.print(f"skipped {count}: {reason}", highlight=False)
        return splits

    @cached_property
    def model(self) -> VLM | MLLM:
        with self._part("loading", self.recipe.model):
            model = load_model(self.recipe.model, self.recipe.seed, self.console)
        check_recipe(self.recipe, model)
        return model

    @cached_property
    def _features(self) -> None:
        splits = self.splits
        with self._part("features", [self.recipe.data, self.recipe.model]):
            cache_features(self.model, images_of(splits), self.out / "cache", self.console)

    def train(self, on_mismatch: str = "fresh") -> list[StageResult]:
        """Train what is not trained yet; the model holds the last stage's weights afterwards."""
        if not self.results:
            splits, model = self.splits, self.model
            _ = self._features
            learners = Learners(model)
            for stage in self.recipe.stages:
                result = train_stage(
                    model, splits, stage, self.recipe.engine, self.out / "stages",
                    on_mismatch=on_mismatch, console=self.console, learners=learners,
                )  # fmt: skip
                self.results.append(result)
            with self._part("training", self.weight_digests()):
                pass
            model.eval()
        return self.results

    def _vlm(self) -> VLM:
        if isinstance(self.model, MLLM):
            raise ValueError(
                f"{self.out}: a sweep of resolutions and visual tokens is for recipes of a VLM; a composition's "
                "resolution policy says them: fastmllm eval evaluates it"
            )
        return self.model

    def export(self, folder: Path) -> None:
        """Write the model of a finished run: transformers' layout where its composition is a family of transformers.

        Raises:
            ValueError: the run is not finished, or its model is a VLM, which no family of transformers is.
            CheckpointError: the folder holds a run of another recipe.
        """
        if not isinstance(self.recipe.model, TalkConfig):
            raise ValueError(
                f"{self.recipe.name}: a VLM's connector and compressor are no family of transformers; export is for a "
                "model with a folder or a composition"
            )
        self._finished()
        self.train(on_mismatch="error")
        model = self.model
        assert isinstance(model, MLLM)
        assert model.tokenizer is not None
        if self.first:
            model.save_pretrained(folder)
            if not (folder / "tokenizer.json").exists():
                write_text(folder / "tokenizer.json", model.tokenizer.to_str())
            kind = model.checkpoint.raw["model_type"]
            layout = "fastmllm's own layout" if kind == "fastmllm" else f"transformers' layout ({kind})"
            self.console.print(f"{folder}: {layout}", highlight=False)

    def _finished(self) -> None:
        if missing := self.unfinished():
            raise ValueError(
                f"{self.out}: no finished run, stage {missing[0]!r} is missing; give --out of the run and its "
                "overrides, or train it first: fastmllm train RECIPE"
            )

    def unfinished(self) -> list[str]:
        """Name the stages that this folder holds no result of."""
        return [s.name for s in self.recipe.stages if not (self.out / "stages" / s.name / "result.json").is_file()]

    def evaluate(self, ranks: Ranks | None = None) -> Report:
        """Evaluate the trained model, or return the stored report of the same weights and questions.

        Args:
            ranks: of `Session.ranks`, where all of them evaluate; the first one alone without.

        Raises:
            ValueError: nothing to ask.
        """
        if not any(self.splits.eval.values()) and not self.published:
            raise ValueError(
                f"{self.recipe.name}: its data has no held-out questions: name data that has, as data.path, or sets "
                "that are published, as eval.sets.pope"
            )
        self.train()
        asked = questions_of({task.name: task.samples() for task in self.published})
        stored = self._stored("evaluation", [self.recipe.eval, asked], lambda: self._evaluate(ranks or Ranks()))
        rows = [Row(**{**r, "estimate": Estimate(**r["estimate"])}) for r in stored["rows"]]
        for failure in stored["failures"]:
            self.console.print(f"not asked: {failure}", highlight=False)
        return Report(rows=rows, records=stored["records"], failures=stored["failures"])

    def ranks(self) -> Ranks:
        """Return which part of an evaluation this rank of the launcher does; every rank must evaluate then."""
        if launched_world_size() == 1:
            return Ranks()
        rank, world, _ = init_ranks()
        return Ranks(rank, world, torch.distributed.barrier)

    def _evaluate(self, ranks: Ranks) -> dict[str, Any]:
        log = AnswerLog(
            self.out / "answers", _key([self.weight_digests(), self.recipe.model, fastmllm.__version__]), ranks
        )
        with progress_bar(self.console, "evaluating") as advance, torch.inference_mode():
            report = evaluate(
                Responder(self.model), self.splits.eval, self.splits.train, self.recipe.eval,
                progress=lambda task, done, total: advance(done, total), log=log, more=self.published,
            )  # fmt: skip
        return {"rows": report.to_json(), "records": report.records, "failures": report.failures}

    @cached_property
    def published(self) -> list[Task]:
        """The tasks of `eval.sets`; what of them was left out is said once."""
        tasks = []
        for loaded in load_sets(self.recipe.eval.sets):
            for line in describe(loaded):
                self.console.print(line, highlight=False)
            tasks += loaded.tasks
        return tasks

    def sweep(self) -> list[Cell]:
        """Sweep resolution, visual tokens and compressor, or return the stored sweep of the same weights."""
        self.train()
        stored = self._stored("sweep", self.recipe.bench, self._sweep)
        return [Cell(**{**c, "accuracy": Estimate(**c["accuracy"])}) for c in stored]

    def _sweep(self) -> list[dict[str, Any]]:
        train = self.splits.train["name"]
        with progress_bar(self.console, "sweeping") as advance:
            points = sweep(
                self._vlm(), self.splits.eval["name"], train, self.recipe.bench,
                progress=lambda what, done, total: advance(done, total),
            )  # fmt: skip
        return [c.to_json() for c in points]

    def ask(self, image: str, prompt: str) -> str:
        """Answer one question with the model of a finished run.

        Raises:
            ImageError: the image is missing or damaged.
            ValueError: the run is not finished; nothing is trained for a question.
            CheckpointError: the folder holds a run of another recipe.
        """
        open_image(image)
        with torch.inference_mode():
            return self.responder().ask(image, prompt)

    def responder(self) -> Responder:
        """Return the model of a finished run, to be asked.

        Raises:
            ValueError: the run is not finished.
            CheckpointError: the folder holds a run of another recipe.
        """
        self._finished()
        self.train(on_mismatch="error")
        return Responder(self.model)

    def weight_digests(self) -> list[str]:
        """Return a digest of what each stage trained."""
        digests = []
        for result in self.results:
            with open(result.weights, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests

    def _stored(self, name: str, config: Any, make: Callable[[], Any]) -> Any:
        """Return what an earlier run stored under the same weights, questions, settings and version, or make it."""
        answers = [[s.answer for s in task] for _, task in sorted(self.splits.train.items())]  # the closed sets
        asked = questions_of(self.splits.eval)
        key = _key([self.weight_digests(), config, self.recipe.model, asked, answers, fastmllm.__version__])
        path = self.out / f"{name}.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                if found["key"] == key:
                    self.parts[name] = {**found["measured"], "reused": True}
                    self.console.print(f"{name}: reused from {path}", highlight=False)
                    return found["value"]
            except (ValueError, KeyError, TypeError):
                self.console.print(f"{name}: {path} is damaged and made again", highlight=False)
        start = time.perf_counter()
        value = make()
        self.parts[name] = measured = _measured(time.perf_counter() - start)
        if self.first:
            write_text(path, json.dumps({"key": key, "measured": measured, "value": value}, default=str))
        return json.loads(json.dumps(value, default=str))

    @contextmanager
    def _part(self, name: str, config: Any) -> Iterator[None]:
        """Measure a part that is kept elsewhere; when this folder's run made it before, its figures then count."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start if name != "training" else sum(r.seconds for r in self.results)
        path, key = self.out / "measured.json", _key([config, fastmllm.__version__])
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.get(name, {}).get("key") == key:
                self.parts[name] = {**stored[name], "reused": True}
                return
        except (OSError, ValueError, AttributeError):
            stored = {}
        self.parts[name] = stored[name] = {"key": key, **_measured(seconds)}
        if self.first:
            write_text(path, json.dumps(stored, indent=1))


def _key(value: Any) -> str:
    return fingerprint(json.loads(json.dumps(value, default=lambda v: dataclasses.asdict(v))))


def _measured(seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # of the process, up to here
        "environment": environment(),
        "ranks": launched_world_size(),
    }


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def check_recipe(recipe: Recipe, model: VLM | MLLM) -> None:
    """Find before the long work what would fail after it: a rule, a resolution or a token count that does not fit.

    Raises:
        ValueError: says which setting, and what would fit.
    """
    learners = Learners(model)
    for stage in recipe.stages:
        apply_rules(learners(stage), stage.trainable)
        if stage.kind in PAIR_KINDS:
            format_of(model, stage)
    if isinstance(model, MLLM) or not isinstance(recipe.model, ModelConfig):
        return
    stride = model.vision.stride
    for where, size in (
        ("model.image_size", recipe.model.image_size),
        *((f"stage {s.name!r}: image_size", s.image_size) for s in recipe.stages if s.image_size is not None),
        *(("bench.image_sizes", s) for s in recipe.bench.image_sizes),
    ):
        if size < stride or size % stride:
            raise ValueError(f"{where}: {size} px is not a multiple of {stride}, the stride of {recipe.model.vision}")
    grid, method = model.grid(recipe.model.image_size) ** 2, recipe.model.compress
    _check_count("model.visual_tokens", grid, recipe.model.visual_tokens, method)
    for stage in recipe.stages:
        grid = model.grid(stage.image_size or recipe.model.image_size) ** 2
        for keep in stage.visual_tokens or (recipe.model.visual_tokens,):
            _check_count(f"stage {stage.name!r}: visual_tokens", grid, keep, method)
    for size, keep, method in cells(recipe.bench, stride):
        _check_count("bench.visual_tokens", model.grid(size) ** 2, keep, "pool" if method == "none" else method)


def _check_count(where: str, grid: int, keep: int, method: str) -> None:
    try:
        compress(torch.zeros(1, grid, 1), method, keep=keep)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
