"""What each of two ranks runs for test_mixed_ranks.py: torchrun … mixed_worker.py OUT; rank 1 is shown other things."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from tiny_compositions import IMAGE, labels, picture, redrawn, tiny
from train_toy import trainer

from fastmllm.models import tower
from fastmllm.models.tower import Known

OUT, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
COMPOSITIONS = (
    ("vit", "tiles", "pixel_shuffle", "tokens"),
    ("vit", "fixed", "resampler", "flamingo"),
    ("mllama", "mllama", "none", "mllama"),
    ("qwen", "native", "merger", "deepstack"),
    ("vit", "dual", "mlp", "cogagent"),
)


def as_a_processor(index: int) -> dict[str, torch.Tensor]:
    """Return an even batch with a picture of one tile, which is four tokens, and an odd one of text."""
    if index % 2:
        ids = torch.tensor([[1, 20, 21 + index]])
        return {"input_ids": ids, "labels": ids}
    ids = torch.tensor([[1, *[IMAGE] * 4, 10, 11, 12]])
    pixels = torch.from_numpy(picture(index, 16, 16)).permute(2, 0, 1)[None] / 255
    return {"input_ids": ids, "labels": torch.where(ids == IMAGE, -100, ids), "pixel_values": pixels}


def run(parts: tuple[str, ...], zero_stage: int) -> None:
    model = redrawn(tiny(*parts))
    processed = parts == COMPOSITIONS[0]
    if processed:  # as a checkpoint of others, which names no resolution policy
        model.packing = None
    rules = dict.fromkeys(model.roles(), 1e-3)
    kept = parts == COMPOSITIONS[-1]
    if kept:  # rank 0 has the features of its frozen towers, rank 1 encodes
        del rules["vision"]
        shown = model.pack([[picture(0)]]).images
        with torch.no_grad():
            known = Known(size=(28, 20), features=tower.encode(model.images, shown))

    def batch(index: int) -> Any:
        if processed:
            return replace(model.inputs(as_a_processor(index)), ids=(str(index),))
        if kept:
            samples = [[1, picture(index) if index % 2 else known, 10, 11 + index]]
            return replace(model.pack(samples, labels(samples)), ids=(str(index),))
        samples = [[1, picture(index), 10, 11, 12]] if index % 2 == 0 else [[1, 20, 21 + index]]
        return replace(model.pack(samples, labels(samples)), ids=(str(index),))

    trainer(
        OUT / f"{'-'.join(parts)}-{zero_stage}", model, batches=batch, engine={"zero_stage": zero_stage},
        changes={"steps": 2, "trainable": rules},
    ).run()  # fmt: skip


for composition in COMPOSITIONS:
    for stage in (2, 3):
        run(composition, stage)
        redrawn.cache_clear()
print(f"rank {RANK} done", flush=True)
