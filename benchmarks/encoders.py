"""Train the demo's recipe with each candidate encoder on the same budget: python benchmarks/encoders.py [key=value ...]

Data, steps, batch, connector and language model are the same; `BUDGET` shortens the recipe to half its steps. Writes
benchmarks/results/<device>/encoders.json, which the demo's report and docs/results.md show.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from fastmllm.bench.meters import milliseconds
from fastmllm.eval.runner import evaluate
from fastmllm.infer.respond import Responder
from fastmllm.recipe import Recipe
from fastmllm.session import Session, environment, write_text

ROOT = Path(__file__).parent.parent
# 112 px keeps DINOv2's cost near the others'; the small ViT learns here, at a higher rate than the connector needs.
CANDIDATES = {
    "efficientnet_lite0, frozen": (),
    "dinov2_small, frozen": ("model.vision=dinov2_small", "model.image_size=112", "bench.image_sizes=[112]"),
    "vit_tiny, trained here": (
        "model.vision=vit_tiny",
        "model.image_size=64",
        "bench.image_sizes=[64]",
        "model.train_vision=true",
        'stages.0.trainable={"vision.*": 1e-3, "connector.*": 2e-3}',
    ),
}
TASKS = ("name", "group", "exists")
BUDGET = ("stages.0.steps=100", "stages.1.steps=100", "data.train_scenes=0", "data.eval_scenes=0", "eval.gallery=0")


def run(name: str, overrides: tuple[str, ...], shared: tuple[str, ...]) -> dict:
    """Train and evaluate one candidate; returns its row."""
    recipe = Recipe.load(ROOT / "recipes" / "emoji.yaml", [*BUDGET, *overrides, *shared])
    session = Session(recipe, ROOT / "out" / "encoders" / name.split(",")[0])
    session.train()
    splits = session.splits
    asked = {task: splits.eval[task] for task in TASKS}
    with torch.inference_mode():
        report = evaluate(Responder(session.model), asked, splits.train, recipe.eval)
    size = recipe.model.image_size
    pixels = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    with torch.inference_mode():
        encoder_ms = milliseconds(lambda: session.model.vision(pixels), repeats=9, warmup=2)
    return {
        "encoder": name,
        "image_size": size,
        "grid_tokens": session.model.grid(size) ** 2,
        "parameters": sum(p.numel() for p in session.model.vision.parameters()),
        "encoder_ms": encoder_ms,
        "train_s": sum(r.seconds for r in session.results),
        "steps": sum(r.steps for r in session.results),
        "loss_last": session.results[-1].loss_last,
        **{task: report.get(task).to_json() for task in TASKS},
        **{f"{task} blind": report.get(task, "blind").to_json() for task in TASKS},
    }


def main() -> None:
    rows = [run(name, overrides, tuple(sys.argv[1:])) for name, overrides in CANDIDATES.items()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = ROOT / "benchmarks" / "results" / device / "encoders.json"
    write_text(path, json.dumps({"environment": environment(), "rows": rows}, indent=1, default=str))
    print(path.relative_to(ROOT))
    for row in rows:
        shares = "  ".join(f"{task} {100 * row[task]['estimate']['value']:.0f} %" for task in TASKS)
        print(f"{row['encoder']:28s} {shares}  {row['train_s']:.0f} s training  {row['encoder_ms']:.1f} ms an image")


if __name__ == "__main__":
    main()
