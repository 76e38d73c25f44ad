"""What each rank of two hosts runs for test_hosts.py: torchrun --nnodes 2 … hosts_worker.py OUT."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from train_toy import toy, trainer

for zero_stage in (2, 3):
    trainer(Path(sys.argv[1]) / f"run{zero_stage}", toy(), engine={"zero_stage": zero_stage}, save_every=3).run()
print(f"rank {os.environ['RANK']} of host {os.environ['GROUP_RANK']} done", flush=True)
