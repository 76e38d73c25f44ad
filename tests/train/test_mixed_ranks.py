"""A rank without images beside one with them: every composition goes on, at every kind of sharding, in time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmllm.train.meters import read_log

HERE = Path(__file__).parent


def test_a_rank_without_images_never_stops_the_others(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "mixed_worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, timeout=180, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "rank 0 done" in done.stdout
    assert "rank 1 done" in done.stdout
    runs = sorted(tmp_path.iterdir())
    assert len(runs) == 10
    for plain, sharded in zip(runs[::2], runs[1::2], strict=True):
        one, two = ([record.loss for record in read_log(run / "log.jsonl")] for run in (plain, sharded))
        assert len(one) == 2
        assert two == pytest.approx(one, abs=1e-6), plain.name
