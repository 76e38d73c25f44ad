from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_toy import toy, trainer

from fastmllm.train.checkpoint import CheckpointError
from fastmllm.train.meters import read_log

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCH_EXTENSIONS_DIR"] = str(out / "extensions")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "ranks_worker.py"), str(out)]
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "rank 0 done" in done.stdout
    assert "rank 1 done" in done.stdout
    return out


def losses(out: Path) -> list[float]:
    return [record.loss for record in read_log(out / "log.jsonl")]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_are_one_process_with_their_batches(two_ranks: Path, tmp_path: Path, zero_stage: int) -> None:
    """2 ranks x 2 micro-batches and 1 process x 4: the same steps."""
    trainer(tmp_path / "one", toy(), engine={"accumulation": 4}).run()
    assert losses(two_ranks / f"plain{zero_stage}") == pytest.approx(losses(tmp_path / "one"), abs=1e-6, rel=0)
    expected = load_file(tmp_path / "one" / "trainable.safetensors")
    for name, value in load_file(two_ranks / f"plain{zero_stage}" / "trainable.safetensors").items():
        assert torch.allclose(value, expected[name], atol=1e-5), name
    one, two = (read_log(path / "log.jsonl") for path in (tmp_path / "one", two_ranks / f"plain{zero_stage}"))
    for name in ("tokens", "targets", "samples", "model_tflop", "hardware_tflop"):
        assert [getattr(record, name) for record in one] == [getattr(record, name) for record in two]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_resume_to_the_bit(two_ranks: Path, zero_stage: int) -> None:
    assert losses(two_ranks / f"cut{zero_stage}") == losses(two_ranks / f"straight{zero_stage}")
    expected = load_file(two_ranks / f"straight{zero_stage}" / "trainable.safetensors")
    for name, value in load_file(two_ranks / f"cut{zero_stage}" / "trainable.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_nothing_was_compiled(two_ranks: Path) -> None:
    assert not list(two_ranks.glob("extensions/**/*"))


def test_a_checkpoint_of_two_ranks_is_refused_by_one(two_ranks: Path) -> None:
    with pytest.raises(CheckpointError, match="ranks: 2 -> 1"):
        trainer(two_ranks / "full", toy(), save_every=2, engine={"accumulation": 2}).run()
