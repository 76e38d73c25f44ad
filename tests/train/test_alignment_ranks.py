"""Two ranks that sample and prefer learn what one process learns from their batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from alignment_toy import grpo, prefer
from safetensors.torch import load_file
from tiny_vlm import colour_photos

from fastmllm.train.meters import read_log

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    colour_photos(out / "photos", count=1)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "alignment_worker.py"), str(out), str(out / "photos")]
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "rank 0 done" in done.stdout
    assert "rank 1 done" in done.stdout
    return out


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_sampled_answers(two_ranks: Path, tmp_path: Path, zero_stage: int) -> None:
    grpo(tmp_path, two_ranks / "photos", engine={"accumulation": 2}).run()
    one, two = read_log(tmp_path / "log.jsonl"), read_log(two_ranks / f"grpo{zero_stage}" / "log.jsonl")
    assert [r.loss for r in two] == pytest.approx([r.loss for r in one], abs=1e-6)
    assert [r.grad_norm for r in two] == pytest.approx([r.grad_norm for r in one], rel=1e-4)
    assert [(r.tokens, r.targets) for r in two] == [(r.tokens, r.targets) for r in one]
    assert [r.reward for r in two] == pytest.approx([r.reward for r in one])
    same_weights(tmp_path, two_ranks / f"grpo{zero_stage}")


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_preferences(two_ranks: Path, tmp_path: Path, zero_stage: int) -> None:
    prefer(tmp_path, two_ranks / "photos", engine={"accumulation": 2})
    one, two = tmp_path / "prefer", two_ranks / f"prefer{zero_stage}" / "prefer"
    assert [r.loss for r in read_log(two / "log.jsonl")] == pytest.approx(
        [r.loss for r in read_log(one / "log.jsonl")], abs=2e-6
    )
    same_weights(one, two)


def same_weights(one: Path, two: Path) -> None:
    expected = load_file(one / "trainable.safetensors")
    for name, value in load_file(two / "trainable.safetensors").items():
        assert (value - expected[name]).abs().max() < 2e-4, name
