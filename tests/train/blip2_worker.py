"""What test_pairs.py runs in a process of its own: a small BLIP-2 on two ranks, killed and not. blip2_worker.py OUT."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path

import forks
from killed import rank_1_dies
from mllm_recipe import session

from fastmllm.pairs import Learners
from fastmllm.run import train_stage

OUT = Path(sys.argv[1])


def train(rank: int, *, out: Path, kill: str = "") -> None:
    """Train all stages; rank 1 is killed in the second step of one, before that step is saved."""
    made = session(OUT, out, "engine.accumulation=1", recipe="from_pairs")
    rank_1_dies(kill, 2)
    learners = Learners(made.model)
    for stage in made.recipe.stages:
        train_stage(
            made.model, made.splits, stage, made.recipe.engine, out, save_every=1, console=made.console,
            learners=learners,
        )  # fmt: skip


forks.run(2, partial(train, out=OUT / "straight"), OUT / "straight.said")
ended = forks.wait(forks.start(2, partial(train, out=OUT / "cut", kill="queries"), OUT / "killed.said"))
assert ended[-1][0] == -signal.SIGKILL, ended
forks.run(2, partial(train, out=OUT / "cut"), OUT / "again.said")
