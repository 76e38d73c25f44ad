"""Sweep resolution x visual tokens x compressor on a trained model: accuracy, latency, step time, memory, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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

LABELS = {"bipartite_merge": "merge", "none": "whole"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """What is swept.

    Args:
        image_sizes: sides of the square image, pixels; multiples of the encoder's stride.
        visual_tokens: K; a count above the encoder's grid at that size is left out.
        methods: compressors; where K is the whole grid there is nothing to compress and one row stands for all.
        limit: questions a cell is scored on.
        train_batch: samples in the timed training step.
        repeats: timed repetitions, the median counts.
    """

    image_sizes: tuple[int, ...] = (128, 160, 224)
    visual_tokens: tuple[int, ...] = (1, 4, 9, 16)
    methods: tuple[str, ...] = ("pool", "bipartite_merge")
    limit: int = 60
    train_batch: int = 8
    repeats: int = 3

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
        progress: called as (what, done, total) before each cell.
    """
    asked = limited(questions, config.limit)
    planned = list(cells(config, model.vision.stride))
    before = model.feature_cache
    results: list[Cell] = []
    try:
        for done, (size, keep, method) in enumerate(planned):
            if progress:
                progress(f"{size} px, {keep} tokens, {method}", done, len(planned))
            if model.feature_cache is None or model.feature_cache.image_size != size:
                model.feature_cache = before if before is not None and before.image_size == size else FeatureCache(
                    model.vision, size, load_image
                )  # fmt: skip
                model.feature_cache.add(s.image for s in asked if s.image)
            results.append(_measure(model, asked, list(train)[: config.train_batch], size, keep, method, config))
    finally:
        model.feature_cache = before
    if progress:
        progress("done", len(planned), len(planned))
    return results


def _measure(
    model: VLM, asked: list[Sample], train: list[Sample], size: int, keep: int, method: str, config: SweepConfig
) -> Cell:
    chosen = method if method != "none" else "pool"
    original = model.config
    model.config = replace(original, compress=chosen)
    try:
        responder = Responder(model, visual_tokens=keep, image_size=size)
        with torch.inference_mode():
            said = responder.answer(asked)
        correct = [normalise(t) == normalise(s.answer) for t, s in zip(said, asked, strict=True)]
        one = collate_for(model, asked[:1], keep=keep, image_size=size, load_pixels=True, with_answers=False)
        many = collate_for(model, train, keep=keep, image_size=size, load_pixels=True, with_answers=True)

        pixels = one.pixels
        assert pixels is not None  # load_pixels=True

        def encode() -> None:
            with torch.inference_mode():
                model.encode_images(pixels)

        def run_prefill() -> None:
            with torch.inference_mode():
                length = int(one.max_seqlen)
                prefill(model, one, model.language.new_cache(1, length))

        def step() -> None:
            model.zero_grad(set_to_none=True)
            (model(many) / many.num_targets).backward()

        connector = list(model.connector.parameters())
        flags = [p.requires_grad for p in connector]
        model.connector.requires_grad_(True)
        try:
            cell = Cell(
                image_size=size,
                visual_tokens=keep,
                grid_tokens=model.grid(size) ** 2,
                method=method,
                accuracy=share(correct, [s.image for s in asked]),
                encoder_ms=milliseconds(encode, config.repeats),
                prefill_ms=milliseconds(run_prefill, config.repeats),
                step_ms=milliseconds(step, config.repeats),
                peak_mib=peak_bytes(step) / 2**20,
                gflops=count_flops(run_prefill) / 1e9,
            )
        finally:
            model.zero_grad(set_to_none=True)
            for parameter, flag in zip(connector, flags, strict=True):
                parameter.requires_grad_(flag)
        return cell
    finally:
        model.config = original


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
