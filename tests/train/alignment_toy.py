"""Stages of alignment on the tiny vision-language model, for one process and for ranks."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from tiny_vlm import tiny_vlm
from train_toy import trainer

from fastmllm.alignment import prompts_of, rollouts_of
from fastmllm.data.build import Splits
from fastmllm.data.sample import Sample
from fastmllm.run import train_stage
from fastmllm.train.engine import EngineConfig
from fastmllm.train.grpo import GRPOConfig, GRPOObjective
from fastmllm.train.stages import StageConfig


def questions(photos: Path) -> dict[str, list[Sample]]:
    found = [
        Sample(id=f"{p.parent.name}/{p.stem}", prompt="What is this?", answer=p.parent.name, task="name", image=str(p))
        for p in sorted(photos.glob("train/*/*.png"))
    ]
    return {"name": [*found, replace(found[0], id="text", image=None)]}


def early_letter(sample: Sample, tokens: Sequence[int]) -> float:
    """Reward tokens of the first half of the vocabulary: half of a random model's are."""
    return sum(token < 140 for token in tokens) / len(tokens)


def grpo(
    out: Path, photos: Path, *, model: Any = None, steps: int = 4, reward: Any = early_letter, **options: Any
) -> Any:
    model = model or tiny_vlm()
    config = GRPOConfig(**({"group": 4, "max_new_tokens": 3} | options.pop("grpo", {})))
    engine = EngineConfig(**options.pop("engine", {}))
    rules = dict.fromkeys(("connector.*", "language.*"), options.pop("rate", 3e-3))
    changes = {"steps": steps, "trainable": rules, "clip": 1.0, "weight_decay": 0.0, "schedule": "constant"}
    changes |= {"kind": "grpo", "grpo": config, "batch_size": 2}
    run = trainer(
        out, model, batches=lambda index: None, changes=changes, engine={"zero_stage": engine.zero_stage,
        "accumulation": engine.accumulation}, objective=partial(GRPOObjective, config=config), **options,
    )  # fmt: skip
    run.batches = prompts_of(model, questions(photos), {}, run.stage, engine)
    run.rollouts = rollouts_of(model, run.stage)
    run.rollouts.reward = reward
    return run


def prefer(out: Path, photos: Path, *, engine: dict[str, Any], steps: int = 4, **options: Any) -> None:
    """Train on pairs of the same questions, by the recipe's own verb."""
    splits = Splits(
        train=questions(photos), eval={}, concepts=(), groups=(), licences={}, notes=(), skipped=Counter(),
        unseen_team=False,
    )  # fmt: skip
    stage = StageConfig(
        name="prefer", kind="prefer", steps=steps, batch_size=2, trainable={"connector.*": 3e-3, "language.*": 3e-3},
        schedule="constant",
    )  # fmt: skip
    train_stage(tiny_vlm(), splits, stage, EngineConfig(**engine), out, console=Console(file=io.StringIO()), **options)
