"""What each of two ranks runs for test_mixed_ranks.py: torchrun … mixed_worker.py OUT; rank 1 never sees an image."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from tiny_compositions import labels, picture, redrawn, tiny
from train_toy import trainer

OUT, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
COMPOSITIONS = (
    ("vit", "tiles", "pixel_shuffle", "tokens"),
    ("vit", "fixed", "resampler", "flamingo"),
    ("mllama", "mllama", "none", "mllama"),
    ("qwen", "native", "merger", "deepstack"),
    ("vit", "dual", "mlp", "cogagent"),
)


def run(parts: tuple[str, ...], zero_stage: int) -> None:
    model = redrawn(tiny(*parts))

    def batch(index: int) -> Any:
        samples = [[1, picture(index), 10, 11, 12]] if index % 2 == 0 else [[1, 20, 21 + index]]
        return replace(model.pack(samples, labels(samples)), ids=(str(index),))

    rules = dict.fromkeys(model.roles(), 1e-3)
    trainer(
        OUT / f"{'-'.join(parts)}-{zero_stage}", model, batches=batch, engine={"zero_stage": zero_stage},
        changes={"steps": 2, "trainable": rules},
    ).run()  # fmt: skip


for composition in COMPOSITIONS:
    for stage in (2, 3):
        run(composition, stage)
        redrawn.cache_clear()
print(f"rank {RANK} done", flush=True)
