"""What test_pretraining.py runs in a process of its own: two ranks of every kind. pairs_worker.py OUT PHOTOS."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import forks
from pairs_toy import llava, pair_run, spoken
from train_toy import trainer

from fastmllm.train.lora import LoRAConfig, _peft
from fastmllm.train.rules import Rule

_peft()  # once, not in every fork
OUT, PHOTOS = Path(sys.argv[1]), Path(sys.argv[2])
RULES: dict[str, Any] = {"vision": 1e-2, "connector": 1e-2, "llm": 1e-2}


def train(name: str, zero_stage: int, **changes: Any) -> Any:
    model = llava()
    trainer(
        OUT / name, model, engine={"zero_stage": zero_stage}, changes={"steps": 2, "trainable": RULES} | changes,
        batches=lambda index: spoken(model, index),
    ).run()  # fmt: skip
    return model


def work(rank: int) -> None:
    for stage in (2, 3):
        for kind in ("clip", "qformer") if stage == 2 else ("clip", "siglip", "qformer"):
            pair_run(OUT / f"{kind}{stage}", PHOTOS, kind, 2, 2, engine={"zero_stage": stage}).run()
        for kind in ("clip",) if stage == 2 else ("siglip", "qformer"):  # one pair in each of a rank's 2 micro-batches
            engine = {"zero_stage": stage, "accumulation": 2}
            pair_run(OUT / f"{kind}{stage}x2", PHOTOS, kind, 1, 4, engine=engine).run()
        train(f"lora{stage}", stage, lora=LoRAConfig(roles=("vision", "llm"), r=2), trainable=RULES)
    for stage in (0, 1, 2, 3):
        trained = train(f"llava{stage}", stage)
        if rank == 0:
            trained.save_pretrained(OUT / f"folder{stage}")
            with torch.no_grad():
                torch.save(trained.logits(spoken(trained, 0)), OUT / f"logits{stage}.pt")
    train("again", 3, trainable={role: Rule(lr=rate, checkpointing=True) for role, rate in RULES.items()})


forks.run(2, work, OUT / "said", limit_s=200)
