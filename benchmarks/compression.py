"""Training-free compressors on the demo's vision transformer and tasks: what each keeps, and what it costs.

    python benchmarks/compression.py [key=value ...]

Trains the demo's recipe once with DINOv2-small at 112 px, pooled to 4, 16, 36 or all of its 64 tokens (out/compression;
`BUDGET` says how long), then measures each line of `LINES` at each K on the same weights, beside random, an even grid,
pooling and the image at a lower resolution; the time also at 448 px, where an image has 1024 tokens. Writes
benchmarks/results/cpu/compression.json.

On a CPU; the times are of one picture and one question, medians of rounds in which all lines take turns: encode,
select (the compressor), assemble (connector, embeddings, insertion), prefill (the language model), their sum, one
decoded token. `promised` is by how much the products of the call shrink at the machine's own rates, measured in the
same run (`fastmllm.bench.roofline`), without the selector's, `realised` by how much the sum does; `tax` is the sum
over that of a random choice of as many at the same place.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from fastmllm.bench.meters import milliseconds, peak_bytes
from fastmllm.bench.roofline import measure_rates, roofline_ms
from fastmllm.compression import METHODS, Placement
from fastmllm.data.images import load_image
from fastmllm.data.sample import Sample
from fastmllm.eval.controls import limited
from fastmllm.eval.intervals import share
from fastmllm.eval.parsing import normalise
from fastmllm.infer.prompt import prefill
from fastmllm.infer.respond import Responder, collate_for
from fastmllm.models.vlm import VLM
from fastmllm.recipe import Recipe
from fastmllm.session import Session, environment, write_text

ROOT = Path(__file__).parent.parent
TASKS = ("name", "group", "exists")
SIZE, WHOLE = 112, 64  # pixels on a side, tokens of the encoder
LARGE, LARGE_WHOLE = 448, 1024  # timed only: the model has learned at SIZE
BUDGET = (
    "model.vision=dinov2_small", f"model.image_size={SIZE}", f"model.visual_tokens={WHOLE}", "stages.0.steps=600",
    "stages.1.steps=200", "stages.0.batch_size=16", "stages.1.batch_size=16", "stages.0.visual_tokens=[4, 16, 36, 64]",
    "stages.1.visual_tokens=[4, 16, 36, 64]", "data.train_scenes=0", "data.eval_scenes=0", "eval.gallery=0",
    "bench.image_sizes=[112]",
)  # fmt: skip
KEEPS = (36, 16, 4)  # squares, so that a smaller image has as many
LARGE_KEEPS = (256, 64)
ROUNDS, LARGE_ROUNDS = 31, 9
LIMIT = 50  # questions a task

# name, place, method, options; a line is measured against `random` at its own place. The encoder ends at layer 10 of
# 12, so that its last attention is layer -3
LINES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    *((f"random {seed}", "connector", "topk", {"scorer": "random", "seed": seed}) for seed in range(3)),
    ("even grid", "connector", "topk", {"scorer": "grid"}),
    ("pooling", "connector", "pool", {}),
    ("longest features", "connector", "topk", {"scorer": "norm"}),
    ("FasterVLM", "connector", "topk", {"scorer": "cls_row", "layer": -3}),
    ("received attention", "connector", "topk", {"scorer": "received", "layer": -3}),
    ("ToMe at the connector", "connector", "bipartite_merge", {}),
    ("ToMe in the encoder", "vision", "bipartite_merge", {}),
    ("VisionZip", "connector", "dominant_contextual", {"contextual": 0.25, "layer": -3}),
    ("VisionZip, faithful", "connector", "dominant_contextual", {"contextual": 0.25, "layer": -3, "mode": "faithful"}),
    ("PruMerge+", "connector", "dominant_contextual", {"merge": "neighbours", "contextual": 0.5, "layer": -3}),
    ("DivPrune", "connector", "greedy_diverse", {"objective": "max_min"}),
    ("SCOPE", "connector", "greedy_diverse", {"objective": "coverage", "relevance": "cls_row", "layer": -3}),
    ("VisPruner", "connector", "pivot_dedup", {"pivots": "score", "share": 0.5, "layer": -3}),
    ("random in the decoder", "language:2", "topk", {"scorer": "random"}),
    ("FastV", "language:2", "topk", {"scorer": "last_row"}),
    ("SparseVLM's raters", "language:2", "topk", {"scorer": "text_rows"}),
    ("DART", "language:2", "pivot_dedup", {"pivots": "norm", "share": 2}),
)


class Whiten(nn.Module):
    """Turn the features of a frozen encoder into uncorrelated ones of variance 1, as they lie over some pictures.

    A connector learns slowly from DINOv2's, which are scaled unevenly; docs/results.md's encoders are not whitened.
    """

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        x = features.flatten(0, -2).double()  # (N, C)
        values, vectors = torch.linalg.eigh(x.T.cov())
        floor = values.mean() * 0.1
        matrix = vectors @ torch.diag((values + floor).rsqrt()) @ vectors.T
        self.register_buffer("mean", x.mean(0).to(features.dtype))
        self.register_buffer("matrix", matrix.to(features.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) @ self.matrix


class Trial:
    """One line at one K: scored once, then timed in turns with all others of its image."""

    def __init__(
        self, model: VLM, name: str, at: str, method: str, keep: int, placement: Placement, size: int, whole: int
    ) -> None:
        self.model, self.name, self.at, self.method, self.keep = model, name, at, method, keep
        self.placement, self.size, self.whole = placement, size, whole
        self.places = whole if at.startswith("language") else keep
        self.accuracy: dict[str, Any] = {}
        self.times: dict[str, list[float]] = defaultdict(list)

    def score(self, asked: dict[str, list[Sample]]) -> None:
        """Answer the questions."""
        self.model.placement = self.placement
        responder = Responder(self.model, visual_tokens=self.places, image_size=self.size)
        for task, samples in asked.items():
            with torch.inference_mode():
                if task == "exists":  # forced choice by log-probability
                    said = [s.choices[max(range(len(row)), key=row.__getitem__)]
                            for s, row in zip(samples, responder.score(samples), strict=True)]  # fmt: skip
                else:
                    said = responder.answer(samples, max_new_tokens=12)
            correct = [normalise(a) == normalise(s.answer) for a, s in zip(said, samples, strict=True)]
            self.accuracy[task] = asdict(share(correct, [s.image for s in samples]))

    def prepare(self, asked: dict[str, list[Sample]]) -> None:
        """Make the call that is timed, and weigh it."""
        self.one = collate_for(
            self.model, asked["name"][:1], keep=self.places, image_size=self.size, load_pixels=True, with_answers=False
        )
        self.peak_mib = peak_bytes(self.answer) / 2**20

    def answer(self) -> Any:
        """Run everything up to the first token."""
        self.model.placement = self.placement
        with torch.inference_mode():
            cache = self.model.language.new_cache(1, int(self.one.max_seqlen) + 1)
            return *prefill(self.model, self.one, cache), cache

    def time(self) -> None:
        """Add one round."""
        marks: dict[str, float] = defaultdict(float)
        with Clock(self.model, self.placement, marks):
            began = time.perf_counter()
            _, continuation, cache = self.answer()
            total = time.perf_counter() - began
        inside = marks["select"] if self.placement.stages else 0.0
        between = marks["select"] - inside
        self.times["encode"].append(1e3 * marks["encode"])
        self.times["select"].append(1e3 * marks["select"])
        self.times["prefill"].append(1e3 * (marks["prefill"] - inside))
        self.times["assemble"].append(1e3 * (total - marks["encode"] - between - marks["prefill"]))
        self.times["total"].append(1e3 * total)
        token = torch.zeros(1, dtype=torch.int64)
        with torch.inference_mode():
            self.times["decode"].append(milliseconds(lambda: continuation.extend(token, [1], cache), 1, warmup=0))

    def row(self) -> dict[str, Any]:
        mode = next(
            (c.mode for c in (self.placement.connector, *(c for _, c in self.placement.stages)) if c is not None),
            "clean",
        )
        return {
            "name": self.name, "method": self.method, "at": self.at, "mode": mode, "keep": self.keep,
            "image_size": self.size, "whole": self.whole, "tasks": self.accuracy, "peak_mib": self.peak_mib,
            **{f"{part}_ms": median(times) for part, times in self.times.items()},
            "total_rounds_ms": self.times["total"],
        }  # fmt: skip


class Clock:
    """Add up where the time of a call goes: encode, select, prefill (the last with what is selected inside)."""

    def __init__(self, model: VLM, placement: Placement, marks: dict[str, float]) -> None:
        self.model, self.placement, self.marks = model, placement, marks

    def __enter__(self) -> None:
        self.encoder = {name: getattr(self.model.vision, name) for name in ("forward", "encode")}
        for name, call in self.encoder.items():
            setattr(self.model.vision, name, self._timed("encode", call))
        compressors = [c for c in (self.placement.connector, *(c for _, c in self.placement.stages)) if c is not None]
        self.timed = [(c, c.forward, "select") for c in compressors]
        self.timed.append((self.model.language, self.model.language.forward, "prefill"))  # type: ignore[arg-type]
        for module, call, part in self.timed:
            module.forward = self._timed(part, call)  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for name in self.encoder:
            delattr(self.model.vision, name)
        for module, _, _ in self.timed:
            del module.forward

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.marks[part] += time.perf_counter() - began

        return run


def features(model: VLM, samples: list[Sample], count: int = 256) -> torch.Tensor:
    """Encode some training pictures, the same ones each time."""
    paths = sorted({s.image for s in samples if s.image})
    pixels = torch.stack([load_image(path, SIZE) for path in paths[:: max(1, len(paths) // count)]])
    with torch.inference_mode():
        return torch.cat([model.vision(part) for part in pixels.split(32)]).clone()


def trials(model: VLM, size: int, whole: int, keeps: tuple[int, ...]) -> list[Trial]:
    """List the whole grid, every line at every K that it can make, and lower resolutions of as many tokens."""
    found = [Trial(model, "whole grid", "connector", "none", whole, Placement(), size, whole)]
    for keep in keeps:
        for name, at, method, options in LINES:
            placement = Placement.of(at, METHODS[method], keep, **options)
            found.append(Trial(model, name, at, method, keep, placement, size, whole))
        smaller = math.isqrt(keep) * model.vision.stride
        found.append(Trial(model, "smaller image", "image", "none", keep, Placement(), smaller, whole))
    return found


def timed(lines: list[Trial], rounds: int, console: Console) -> None:
    """Time all lines in turns; the first round warms up."""
    for _ in track(range(rounds + 1), f"timing {lines[0].whole} tokens", console=console):
        for trial in lines:
            trial.time()
    for trial in lines:
        trial.times = defaultdict(list, {part: times[1:] for part, times in trial.times.items()})


def main() -> None:
    if torch.cuda.is_available():
        raise SystemExit("benchmarks/compression.py measures a CPU: its clocks do not wait for a GPU")
    recipe = Recipe.load(ROOT / "recipes" / "emoji.yaml", [*BUDGET, *sys.argv[1:]])
    session = Session(recipe, ROOT / "out" / "compression")
    model, splits = session.model, session.splits
    model.connector = nn.Sequential(Whiten(features(model, splits.train["name"])), model.connector)
    session.train()
    model.feature_cache = None
    asked = {task: limited(splits.eval[task], LIMIT) for task in TASKS}
    console = Console()
    small, large = trials(model, SIZE, WHOLE, KEEPS), trials(model, LARGE, LARGE_WHOLE, LARGE_KEEPS)
    for trial in track(small, "scoring", console=console):
        trial.score(asked)
    rates = measure_rates(model.language.head_weight.dtype)
    rows = []
    for lines, rounds in ((small, ROUNDS), (large, LARGE_ROUNDS)):
        for trial in lines:
            trial.prepare(asked)
        promised = [roofline_ms(trial.answer, rates) for trial in lines]
        timed(lines, rounds, console)
        rows += judged([trial.row() for trial in lines], promised)
    path = ROOT / "benchmarks" / "results" / "cpu" / "compression.json"
    about = {"flops_per_s": rates.flops, "bytes_per_s": rates.bytes, "budget": list(BUDGET)}
    write_text(path, json.dumps({"environment": environment(), **about, "rows": rows}, indent=1, default=str))
    console.print(table(rows))
    console.print(path.relative_to(ROOT))


def judged(rows: list[dict[str, Any]], promised: list[float]) -> list[dict[str, Any]]:
    """Add what a row keeps of the whole grid's accuracy, its tax, and realised and promised speed-up."""

    def rounds(several: list[dict[str, Any]]) -> list[float]:
        return [sum(times) / len(times) for times in zip(*(r["total_rounds_ms"] for r in several), strict=True)]

    def ratio(a: list[float], b: list[float]) -> float:
        return median(x / y for x, y in zip(a, b, strict=True))

    whole = rows[0]
    randoms: dict[tuple[str, int], list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        if row["name"].startswith("random"):
            randoms[row["at"], row["keep"]].append(n)
    for row, ideal in zip(rows, promised, strict=True):
        shares = [row["tasks"][task]["value"] / whole["tasks"][task]["value"] for task in row["tasks"]]
        beside = randoms[row["at"], row["keep"]]
        # the work that is left, without what the selector computes
        left = promised[beside[0]] if beside else ideal
        row["kept"] = sum(shares) / len(shares) if shares else None
        row["tax"] = ratio(row["total_rounds_ms"], rounds([rows[n] for n in beside])) - 1 if beside else None
        row["promised"], row["realised"] = promised[0] / left, ratio(whole["total_rounds_ms"], row["total_rounds_ms"])
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Return what a reader looks at first."""
    out = Table(title="Compressors on DINOv2-small; one picture, one question; ms")
    for name in ("of", "K", "method", *TASKS, "kept", "encode", "select", "assemble", "prefill", "total", "decode",
                 "MiB", "tax", "realised/promised"):  # fmt: skip
        out.add_column(name, justify="left" if name == "method" else "right")
    for r in rows:
        out.add_row(
            str(r["whole"]), str(r["keep"]), r["name"],
            *(f"{100 * r['tasks'][task]['value']:.0f}" if r["tasks"] else "" for task in TASKS),
            f"{100 * r['kept']:.0f} %" if r["tasks"] else "",
            *(f"{r[f'{part}_ms']:.1f}" for part in ("encode", "select", "assemble", "prefill", "total", "decode")),
            f"{r['peak_mib']:.0f}", "" if r["tax"] is None else f"{100 * r['tax']:+.1f} %",
            f"{r['realised']:.2f}/{r['promised']:.2f}",
        )  # fmt: skip
    return out


if __name__ == "__main__":
    main()
