"""Measure the expert-model path beside the fused model on the demo's questions: python benchmarks/expert.py

Needs `make demo` first: the fused model is the demo's, and its captions are the descriptions. The language model behind
them is SmolLM2 as published, which never saw an image, and once more the demo's own, tuned to answer briefly. Writes
benchmarks/results/<device>/expert.json; docs/results.md shows it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastmllm.data.tasks import PROMPTS
from fastmllm.eval.runner import evaluate
from fastmllm.infer.expert import ExpertResponder
from fastmllm.infer.respond import Responder
from fastmllm.recipe import Recipe
from fastmllm.run import load_model
from fastmllm.session import Session, environment, write_text

ROOT = Path(__file__).parent.parent
TASKS = ("name", "group", "exists", "yes_no")


def main() -> None:
    recipe = Recipe.load(ROOT / "recipes" / "emoji.yaml", ["eval.gallery=0"])
    session = Session(recipe, ROOT / "out" / "demo")
    session.train()
    fused = Responder(session.model)
    asked = {task: session.splits.eval[task] for task in TASKS}

    def describe(image: str) -> str:
        return fused.ask(image, PROMPTS["en"]["caption"])

    paths = {
        "fused": fused,
        "captions, SmolLM2 as published": ExpertResponder(describe, Responder(load_model(recipe.model, recipe.seed))),
        "captions, the fused model's SmolLM2": ExpertResponder(describe, fused),
    }
    rows = []
    with torch.inference_mode():
        for name, responder in paths.items():
            report = evaluate(responder, asked, session.splits.train, recipe.eval)
            rows.append({"path": name, **{t: report.get(t).to_json() for t in TASKS}})
            print(name, {t: round(100 * report.get(t).estimate.value) for t in TASKS}, flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = ROOT / "benchmarks" / "results" / device / "expert.json"
    write_text(path, json.dumps({"environment": environment(), "rows": rows}, indent=1, default=str))
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
