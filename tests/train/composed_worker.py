"""What test_streamed.py runs in a process of its own: a Flamingo and a tar of all kinds. composed_worker.py OUT."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import forks
import torch
from killed import rank_1_dies
from mllm_recipe import session, write_words
from shard_recipe import NOTHING
from tiny_shards import png, talk, write_tar

from fastmllm.data.shards import SourceConfig
from fastmllm.run import train_stage
from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig

OUT = Path(sys.argv[1])
MEMBERS: list[tuple[str, Any]] = [
    ("0.json", talk("Say yes", "yes")),
    ("1.json", talk("What is this?", "red", images=1)), ("1.png", png(250)),
    ("2.json", talk("Which is blue?", "no", images=2)), ("2.0.png", png(9, (40, 20))), ("2.1.png", png(90)),
    ("3.json", talk("<video>What happens?", "it turns red")), *((f"3.video.{n}.png", png(40 * n)) for n in range(5)),
    ("4.json", talk("What is this?", "torn", images=1)), ("4.png", png(3, (32, 32))[:-30]),
    ("5.json", talk("Say no", "no", "And now?", "yes")),
    ("6.json", talk("Say red", "red")),
]  # fmt: skip


def train(rank: int, *, out: Path, ranks: int, dies: bool = False) -> None:
    """Take four steps of two samples, on one rank or two."""
    if dies:
        rank_1_dies("composed", 3)
    made = session(OUT, out)
    for number, parameter in enumerate(made.model.parameters()):  # gates are open: what is across is seen
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    stage = StageConfig(
        name="composed", steps=4, batch_size=1, trainable=dict.fromkeys(made.model.roles(), 1e-3), eps=1e-5,
        sources=(SourceConfig(name="mixed", path=str(OUT / "mixed.tar"), max_frames=3),),
    )  # fmt: skip
    engine = EngineConfig(zero_stage=3, workers=1, accumulation=2 // ranks)
    train_stage(made.model, NOTHING, stage, engine, out, save_every=1, console=made.console)


write_tar(OUT / "mixed.tar", MEMBERS)
write_words(OUT)
forks.run(1, partial(train, out=OUT / "one", ranks=1), OUT / "one.said")
forks.run(2, partial(train, out=OUT / "two", ranks=2), OUT / "two.said")
ended = forks.wait(forks.start(2, partial(train, out=OUT / "cut", ranks=2, dies=True), OUT / "killed.said"))
assert ended[-1][0] == -signal.SIGKILL, ended
assert max(path.name for path in OUT.glob("cut/**/step-*")) == "step-00000002"
forks.run(2, partial(train, out=OUT / "cut", ranks=2), OUT / "again.said")
