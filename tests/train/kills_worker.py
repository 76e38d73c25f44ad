"""What test_kills.py runs in a process of its own: stages that are killed and run again. kills_worker.py OUT PHOTOS."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import forks
from alignment_toy import grpo, prefer, questions
from rich.console import Console
from shard_recipe import NOTHING, recipe_of
from tiny_vlm import tiny_vlm
from train_toy import joined, sample, toy, trainer

from fastmllm.data.build import Splits
from fastmllm.run import cache_features, images_of, train_stage
from fastmllm.train import trainer as trainer_module
from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig

OUT, PHOTOS = Path(sys.argv[1]), Path(sys.argv[2])
STEPS, KILLED = 20, 11  # the 11th step is done and lost: step 10 is the last one saved
SAVED: dict[str, Any] = {"save_every": 10}
QUIET = Console(file=io.StringIO())
(OUT / "shards").mkdir()
RECIPE = recipe_of(OUT / "shards", workers=1, window=2)


def plain(out: Path) -> None:
    """Dropout, accumulation, and batches packed of two."""
    engine = {"zero_stage": 3, "accumulation": 2}
    model = toy(dropout=0.2)
    run = trainer(
        out, model, changes={"steps": STEPS}, engine=engine, keep=2, **SAVED,
        batches=lambda i: joined(sample(2 * i), sample(2 * i + 1)),
    )  # fmt: skip
    run.run()


def shards(out: Path) -> None:
    """Shards by worker processes, arranged over two steps; weights, torn and missing images."""
    stage = replace(RECIPE.stages[0], steps=STEPS)
    train_stage(tiny_vlm(), NOTHING, stage, RECIPE.engine, out, console=QUIET, **SAVED)


def packed(out: Path) -> None:
    """Shards, micro-batches filled to a budget, the images' features kept."""
    stage = replace(RECIPE.stages[0], steps=STEPS, batch_size=1, balance_steps=0, max_tokens=170, max_images=3)
    engine = replace(RECIPE.engine, feature_cache_gib=1.0)
    train_stage(tiny_vlm(), NOTHING, stage, engine, out, console=QUIET, **SAVED)


def mixture(out: Path) -> None:
    """Two tasks by weight, the encoder's features from the cache on disk."""
    model, found = tiny_vlm(), questions(PHOTOS)
    tasks = {"name": found["name"][:-1], "yes_no": found["name"][-1:]}
    splits = Splits(
        train=tasks, eval={}, concepts=(), groups=(), licences={}, notes=(), skipped=Counter(), unseen_team=False
    )
    cache_features(model, images_of(splits), OUT / "features", QUIET)
    stage = StageConfig(
        name="mixed", steps=STEPS, batch_size=2, trainable={"connector.*": 3e-3, "language.*": 3e-3},
        mixture={"name": 3.0, "yes_no": 1.0},
    )  # fmt: skip
    train_stage(model, splits, stage, EngineConfig(), out, console=QUIET, **SAVED)


def preferred(out: Path) -> None:
    prefer(out, PHOTOS, steps=STEPS, engine={"zero_stage": 2}, **SAVED)


def sampled(out: Path) -> None:
    """Killed between two steps on the same answers."""
    run = grpo(out, PHOTOS, steps=STEPS, grpo={"inner": 3}, engine={"zero_stage": 2}, **SAVED)
    run.run()


def killed_after(step: int, stage: Callable[[Path], None], out: Path, ranks: int) -> Callable[[int], None]:
    """Let the last rank be killed with its record of a step written, before that step is saved."""
    real = trainer_module.Trainer._step

    def step_of(self: Any, engine: Any, at: int, *more: Any) -> Any:
        record = real(self, engine, at, *more)
        if at + 1 == step and engine.rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return record

    def work(rank: int) -> None:
        trainer_module.Trainer._step = step_of  # type: ignore[method-assign]
        stage(out)

    return work


STAGES = (
    *((plain, 1), (plain, 2), (shards, 1), (shards, 2), (packed, 2), (mixture, 2)),
    *((preferred, 2), (sampled, 2)),
)
for stage, ranks in STAGES:
    place = OUT / f"{stage.__name__}-{ranks}"

    def work(rank: int, *, out: Path, stage: Callable[[Path], None] = stage) -> None:
        stage(out)

    forks.run(ranks, partial(work, out=place / "straight"), place / "straight.said")
    ended = forks.wait(forks.start(ranks, killed_after(KILLED, stage, place / "cut", ranks), place / "killed.said"))
    assert ended[-1][0] == -signal.SIGKILL, (stage, ended)
    assert max(path.name for path in place.glob("cut/**/step-*")) == "step-00000010", stage
    forks.run(ranks, partial(work, out=place / "cut"), place / "again.said")
