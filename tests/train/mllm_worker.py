"""What each of two ranks runs for test_mllm_stages.py: torchrun … mllm_worker.py FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from mllm_recipe import session

FOLDER = Path(sys.argv[1])
for zero_stage in (2, 3):
    session(FOLDER, FOLDER / f"two{zero_stage}", f"engine.zero_stage={zero_stage}").train()
print(f"rank {os.environ['RANK']} done", flush=True)
