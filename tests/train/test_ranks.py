from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from test_trainer import Stop, losses, stop_after
from train_toy import toy, trainer

from fastmllm.train.checkpoint import CheckpointError
from fastmllm.train.inventory import latest_checkpoint
from fastmllm.train.meters import read_log

HERE = Path(__file__).parent
CHANGED = {"same": 2, "third": 1, "none": 3}  # ranks_worker.py's runs -> ZeRO stage of the process that goes on


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    for name, zero_stage in (("same", 2), ("third", 2), ("none", 3)):
        engine = {"zero_stage": zero_stage, "accumulation": 2}
        with pytest.raises(Stop):
            trainer(out / f"grown-{name}", toy(), engine=engine, save_every=2, on_step=stop_after(3, Stop())).run()
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


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight")
    trainer(out, toy(), engine={"accumulation": 2}).run()
    return out


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_are_one_process_with_their_batches(two_ranks: Path, tmp_path: Path, zero_stage: int) -> None:
    """2 ranks x 2 micro-batches and 1 process x 4: the same steps."""
    trainer(tmp_path / "one", toy(), engine={"accumulation": 4}).run()
    assert losses(two_ranks / f"plain{zero_stage}") == pytest.approx(losses(tmp_path / "one"), abs=1e-6, rel=0)
    same_weights(two_ranks / f"plain{zero_stage}", tmp_path / "one")
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


@pytest.mark.parametrize("name", CHANGED)
def test_one_process_goes_on_as_two_ranks(two_ranks: Path, straight: Path, name: str) -> None:
    assert losses(two_ranks / f"grown-{name}") == pytest.approx(losses(straight), abs=1e-5, rel=0)
    same_weights(two_ranks / f"grown-{name}", straight)


@pytest.mark.parametrize("name", CHANGED)
def test_two_ranks_go_on_as_one_process(two_ranks: Path, straight: Path, name: str) -> None:
    out = two_ranks / f"shrunk-{name}"
    checkpoint = latest_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    assert len(list(checkpoint.glob("state-*"))) == 2
    assert_pieces_are_everything_once(checkpoint)
    console = Console(file=io.StringIO(), width=500)
    trainer(out, toy(), save_every=2, engine={"zero_stage": CHANGED[name], "accumulation": 2}, console=console).run()
    assert "resumes after step 4 of 6 (" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "ranks: 2 -> 1; accumulation: 1 -> 2" in console.file.getvalue()  # type: ignore[attr-defined]
    assert losses(out) == pytest.approx(losses(straight), abs=1e-5, rel=0)
    same_weights(out, straight)


def assert_pieces_are_everything_once(checkpoint: Path) -> None:
    taken: dict[str, list[tuple[int, int]]] = {}
    for path in checkpoint.glob("state-*"):
        with safe_open(str(path), "pt") as file:
            for name, (start, size, step) in json.loads(file.metadata()["pieces"]).items():
                taken.setdefault(name, []).append((start, size))
                assert step == 4
    for name, param in toy().named_parameters():
        learns = name.startswith(("connector.", "language.blocks.1."))
        at = 0
        for start, size in sorted(taken.pop(name, [])):
            assert start == at, name
            at += size
        assert at == (param.numel() if learns else 0), name
    assert not taken


def same_weights(one: Path, two: Path) -> None:
    expected = load_file(two / "trainable.safetensors")
    for name, value in load_file(one / "trainable.safetensors").items():
        assert torch.allclose(value, expected[name], atol=1e-5), name


def test_another_number_of_micro_batches_is_refused(two_ranks: Path) -> None:
    with pytest.raises(CheckpointError, match=r"micro_batches: 2 -> 1 \(accumulation times ranks is a step"):
        trainer(two_ranks / "full", toy(), save_every=2).run()
