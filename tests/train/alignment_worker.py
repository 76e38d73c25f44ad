"""What each of two ranks runs for test_alignment_ranks.py: torchrun … alignment_worker.py OUT PHOTOS."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from alignment_toy import grpo, prefer
from tiny_vlm import tiny_vlm

OUT, PHOTOS = Path(sys.argv[1]), Path(sys.argv[2])
RANK = int(os.environ["RANK"])

for stage in (2, 3):
    # other weights on rank 1: every rank samples, and refers to, those of rank 0
    run = grpo(OUT / f"grpo{stage}", PHOTOS, model=tiny_vlm(RANK), engine={"zero_stage": stage})
    run.recipe["initial_weights"] = run.recipe["frozen_weights"] = "by rank 0"
    run.run()
    prefer(OUT / f"prefer{stage}", PHOTOS, engine={"zero_stage": stage})
print(f"rank {RANK} done", flush=True)
