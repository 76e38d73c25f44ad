"""Sweep resolution x visual tokens x compressor on a trained model: accuracy, latency, step time, memory, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from rich.table import Table

from fastmllm.bench.meters import count_flops, milliseconds, peak_bytes
from fastmllm.compression import METHODS
from fastmllm.data.images import load_image
from fastmllm.data.sample import Sample
from fastmllm.eval.controls import limited
from fastmllm.eval.intervals import Estimate, share
from fastmllm.eval.parsing import normalise
from fastmllm.infer.prompt import prefill
from fastmllm.infer.respond import Responder, collate_for
from fastmllm.models.features import FeatureCache
from fastmllm.models.vlm import VLM

LABELS = {"bipartite_merge": "token merging", "pool": "pooling", "none": "whole grid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """What is swept.

    Args:
        image_sizes: sides of the square image, pixels; multiples of the encoder's stride.
        visual_tokens: K; a count above the encoder's grid at that size is left out.
        methods: compressors; where K is the whole grid there is nothing to compress and one row stands for all.
        limit: questions a cell is scored on.
        train_batch: samples in the timed training step.
        repeats: rounds of timing (a training step, three prefills, three encodings of each cell); medians count.
    """

    image_sizes: tuple[int, ...] = (128, 160, 224)
    visual_tokens: tuple[int, ...] = (1, 4, 9, 16)
    methods: tuple[str, ...] = ("pool", "bipartite_merge")
    limit: int = 60
    train_batch: int = 8
    repeats: int = 4

    def __post_init__(self) -> None:
        for name in ("image_sizes", "visual_tokens", "methods"):
            if not getattr(self, name):
                raise ValueError(f"bench.{name} is empty: give at least one value")
        if unknown := [m for m in self.methods if m not in METHODS]:
            raise ValueError(f"bench.methods: {unknown} are unknown; known: {', '.join(METHODS)}")
        if min(self.limit, self.train_batch, self.repeats) < 1:
            raise ValueError("bench: limit, train_batch and repeats must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One point of the sweep. Latencies are medians at batch 1 (prefill) and `train_batch` (step)."""

    image_size: int
    visual_tokens: int
    grid_tokens: int
    method: str
    accuracy: Estimate
    encoder_ms: float
    prefill_ms: float
    step_ms: float
    peak_mib: float
    gflops: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return setting(self.image_size, self.visual_tokens, self.method)


def setting(image_size: int, visual_tokens: int, method: str) -> str:
    """Name a cell's setting in words."""
    return f"{image_size} px, {visual_tokens} token{'s'[: visual_tokens != 1]}, {LABELS.get(method, method)}"


def cells(config: SweepConfig, stride: int) -> Iterator[tuple[int, int, str]]:
    """List (image size, K, method), the uncompressed grid once a size."""
    for size in config.image_sizes:
        grid = (size // stride) ** 2
        for keep in config.visual_tokens:
            for method in config.methods:
                if keep < grid or (keep == grid and method == config.methods[0]):
                    yield size, keep, method if keep < grid else "none"


def sweep(
    model: VLM,
    questions: Sequence[Sample],
    train: Sequence[Sample],
    config: SweepConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Cell]:
    """Measure every cell on held-out naming questions (exact match).

    The weights stay as they are: a cell says what the model trained at its own setting does at this one.

    Args:
        model: trained.
        questions: held-out samples of one task.
        train: samples for the timed training step.
        config: the grid.
        progress: called as (what, done, total) before each cell and each round of timing.
    """
    asked = limited(questions, config.limit)
    planned = list(cells(config, model.vision.stride))
    before = model.feature_cache
    trials: list[_Trial] = []
    connector = list(model.connector.parameters())
    flags = [p.requires_grad for p in connector]
    model.connector.requires_grad_(True)
    try:
        for done, (size, keep, method) in enumerate(planned):
            if progress:
                progress(setting(size, keep, method), done, len(planned) + config.repeats)
            if model.feature_cache is None or model.feature_cache.image_size != size:
                model.feature_cache = before if before is not None and before.image_size == size else FeatureCache(
                    model.vision, size, load_image
                )  # fmt: skip
                model.feature_cache.add(s.image for s in asked if s.image)
            trials.append(_Trial(model, asked, list(train)[: config.train_batch], size, keep, method))
        for done in range(config.repeats):
            if progress:
                progress("timing", len(planned) + done, len(planned) + config.repeats)
            for trial in trials:
                trial.time()
        results = [trial.cell() for trial in trials]
    finally:
        model.feature_cache = before
        model.zero_grad(set_to_none=True)
        for parameter, flag in zip(connector, flags, strict=True):
            parameter.requires_grad_(flag)
    if progress:
        progress("done", len(planned) + config.repeats, len(planned) + config.repeats)
    return results


class _Trial:
    """One cell in the making: scored at once, timed in turns with the others, so that a busy moment meets them all."""

    def __init__(self, model: VLM, asked: list[Sample], train: list[Sample], size: int, keep: int, method: str) -> None:
        self.model, self.size, self.keep, self.method = model, size, keep, method
        self.times: dict[str, list[float]] = {"encoder": [], "prefill": [], "step": []}
        with self._setting():
            with torch.inference_mode():
                said = Responder(model, visual_tokens=keep, image_size=size).answer(asked)
            correct = [normalise(t) == normalise(s.answer) for t, s in zip(said, asked, strict=True)]
            self.accuracy = share(correct, [s.image for s in asked])
            self.one = collate_for(model, asked[:1], keep=keep, image_size=size, load_pixels=True, with_answers=False)
            self.many = collate_for(model, train, keep=keep, image_size=size, load_pixels=True, with_answers=True)
            self._step()  # the first of a shape is slow
            self.peak_mib = peak_bytes(self._step) / 2**20
            self.gflops = count_flops(self._prefill) / 1e9

    def time(self) -> None:
        """Add one round to the times of encoder, prefill and training step."""
        with self._setting():
            for name, call, repeats in (
                ("encoder", self._encode, 3), ("prefill", self._prefill, 3), ("step", self._step, 1),
            ):  # fmt: skip
                self.times[name] += [milliseconds(call, 1, warmup=0) for _ in range(repeats)]

    def cell(self) -> Cell:
        return Cell(
            image_size=self.size,
            visual_tokens=self.keep,
            grid_tokens=self.model.grid(self.size) ** 2,
            method=self.method,
            accuracy=self.accuracy,
            **{f"{name}_ms": median(times) for name, times in self.times.items()},
            peak_mib=self.peak_mib,
            gflops=self.gflops,
        )

    @contextmanager
    def _setting(self) -> Iterator[None]:
        before = self.model.config
        self.model.config = replace(before, compress="pool" if self.method == "none" else self.method)
        try:
            yield
        finally:
            self.model.config = before

    def _encode(self) -> None:
        assert self.one.pixels is not None  # load_pixels=True
        with torch.inference_mode():
            self.model.encode_images(self.one.pixels)

    def _prefill(self) -> None:
        with torch.inference_mode():
            prefill(self.model, self.one, self.model.language.new_cache(1, int(self.one.max_seqlen)))

    def _step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        (self.model(self.many) / self.many.num_targets).backward()


def pareto(points: Sequence[Cell]) -> list[Cell]:
    """Return the cells that no other beats in both prefill latency and accuracy, fastest first."""
    front: list[Cell] = []
    best = -math.inf
    for cell in sorted(points, key=lambda c: (c.prefill_ms, -c.accuracy.value)):
        if cell.accuracy.value > best:
            front.append(cell)
            best = cell.accuracy.value
    return front


def table(points: Sequence[Cell]) -> Table:
    """Return a rich table of a sweep; cells on the Pareto front are marked."""
    out = Table(title="Resolution x visual tokens: % right and 95 % interval; prefill at batch 1, encoder included")
    for name in ("px", "tokens", "method", "% right", "encode ms", "prefill ms", "step ms", "MiB", "GFLOP", ""):
        out.add_column(name, justify="left" if name == "method" else "right")
    front = pareto(points)
    for c in points:
        a = c.accuracy
        out.add_row(
            str(c.image_size),
            f"{c.visual_tokens}/{c.grid_tokens}",
            LABELS.get(c.method, c.method),
            f"{100 * a.value:.0f} {100 * a.low:.0f}-{100 * a.high:.0f}",
            f"{c.encoder_ms:.1f}",
            f"{c.prefill_ms:.1f}",
            f"{c.step_ms:.0f}",
            f"{c.peak_mib:.0f}",
            f"{c.gflops:.2f}",
            "*" if c in front else "",
        )
    return out
