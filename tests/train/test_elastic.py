"""Checkpoints of a run: atomic, checked, and read by other ranks and ZeRO stages than wrote them."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_checkpoint import small_files
from test_trainer import Stop, losses, stop_after
from torch import nn
from train_toy import toy, trainer, values

from fastmllm.train.checkpoint import CheckpointError
from fastmllm.train.elastic import load_checkpoint, save_checkpoint
from fastmllm.train.inventory import (
    find_checkpoint,
    latest_checkpoint,
    read_meta,
    readable_meta,
    remove_leftovers,
)
from fastmllm.train.partition import KINDS, Piece


class OneRank:
    """An engine that updates one tensor."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, size: int = 100) -> None:
        self.tensor, self.step = torch.arange(size, dtype=torch.float32), torch.tensor(7.0)
        self.model = nn.BatchNorm1d(2)
        self.adopted = False

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def pieces(self, *, own: bool = False) -> list[Piece]:
        tensors = {kind: self.tensor if kind == "master" else self.tensor.clone() for kind in KINDS}
        return [Piece(name="w", start=0, tensors=tensors, step=self.step)]

    def adopt_pieces(self) -> None:
        self.adopted = True


def test_a_checkpoint_comes_back_with_its_random_state(tmp_path: Path) -> None:
    engine = OneRank()
    torch.manual_seed(5)
    engine.model.running_mean.fill_(3.0)
    path = save_checkpoint(engine, tmp_path, {"step": 3, "recipe": {"a": 1}}, extra=[[[1], [2, 3]], "b"])
    expected = torch.rand(4)
    engine = OneRank()
    engine.tensor.zero_()
    engine.step.zero_()
    assert latest_checkpoint(tmp_path) == path
    assert find_checkpoint(engine, tmp_path) == (path, [])
    assert read_meta(path)["recipe"] == {"a": 1}
    assert load_checkpoint(engine, path) == [[[1], [2, 3]], "b"]
    assert engine.adopted
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(engine.tensor, torch.arange(100.0))
    assert (engine.step, engine.model.running_mean.tolist()) == (7, [3.0, 3.0])


def test_old_checkpoints_go_once_the_new_one_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(OneRank(), tmp_path, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]


def test_a_write_that_fails_half_way_keeps_the_last(tmp_path: Path) -> None:
    first = save_checkpoint(OneRank(), tmp_path, {"step": 3})
    with small_files(16384), pytest.raises(CheckpointError) as raised:
        save_checkpoint(OneRank(100_000), tmp_path, {"step": 6})
    message = str(raised.value)
    assert "step-00000006" in message
    assert "step-00000003 is intact" in message
    assert "MiB free" in message
    assert find_checkpoint(OneRank(), tmp_path) == (first, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


@pytest.mark.parametrize("where", ["mkdir", "meta", "replace", "fsync"])
def test_a_full_disk_anywhere_keeps_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    first = save_checkpoint(OneRank(), tmp_path, {"step": 3})

    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    places = {
        "mkdir": (Path, "mkdir"),
        "meta": (Path, "write_text"),
        "replace": (os, "replace"),
        "fsync": (os, "fsync"),
    }
    monkeypatch.setattr(*places[where], full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(OneRank(), tmp_path, {"step": 6})
    monkeypatch.undo()
    assert find_checkpoint(OneRank(), tmp_path) == (first, [])
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_host_that_does_not_share_the_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    with pytest.raises(CheckpointError, match="rank 0 does not see what rank 0 made; all hosts must share"):
        save_checkpoint(OneRank(), tmp_path, {"step": 6})


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from test_elastic import OneRank
from fastmllm.train.elastic import save_checkpoint
class Dies(OneRank):
    def pieces(self, *, own=False):
        os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(OneRank(), Path(sys.argv[1]), {"step": 3})
save_checkpoint(Dies(), Path(sys.argv[1]), {"step": 6})
"""


def test_a_kill_during_the_write_keeps_the_last(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(here), str(here.parent / "support")]
    done = subprocess.run(command, cwd=here.parents[1], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [path.name.split("-")[1] for path in tmp_path.glob("*.tmp-*")] == ["00000006.tmp"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert read_meta(latest)["step"] == 3
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_a_kill_between_the_two_renames_is_seen(tmp_path: Path) -> None:
    save_checkpoint(OneRank(), tmp_path, {"step": 3}, keep=2)
    path = save_checkpoint(OneRank(), tmp_path, {"step": 6}, keep=2)
    (tmp_path / "latest").write_text("step-00000003")
    assert latest_checkpoint(tmp_path) == path
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert find_checkpoint(OneRank(), tmp_path / "nowhere") == (None, [])


def damage(path: Path, how: str) -> None:
    before = path.read_bytes()
    if how == "cut":
        path.write_bytes(before[:-7])
    elif how == "gone":
        path.unlink()
    else:  # the last but one byte is a tensor's, or a digit
        path.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])


@pytest.mark.parametrize("file", ["state-00000.safetensors", "rank-00000.pt", "meta.json"])
@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, file: str, how: str) -> None:
    first = save_checkpoint(OneRank(), tmp_path, {"step": 3}, keep=2)
    second = save_checkpoint(OneRank(), tmp_path, {"step": 6}, keep=2)
    damage(second / file, how)
    found, problems = find_checkpoint(OneRank(), tmp_path)
    assert found == first
    if (file, how) == ("meta.json", "gone"):  # as a folder that never was complete
        return
    assert len(problems) == 1
    assert f"step-00000006/{file} is damaged (" in problems[0]
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step-00000003", "step-00000006.damaged"}
    damage(first / file, how)
    if (file, how) != ("meta.json", "gone"):
        with pytest.raises(CheckpointError, match=r"step-00000003/.* is damaged \(.*; put a whole copy there, or del"):
            find_checkpoint(OneRank(), tmp_path)
        assert first.exists()


def test_a_damaged_meta_is_not_the_runs(tmp_path: Path) -> None:
    save_checkpoint(OneRank(), tmp_path, {"step": 3, "recipe": "a"}, keep=2)
    path = save_checkpoint(OneRank(), tmp_path, {"step": 6, "recipe": "a"}, keep=2)
    text = (path / "meta.json").read_text()
    for other in ("{", "[]", '{"seconds": 3}', "3", text.replace('"a"', '"b"')):
        (path / "meta.json").write_text(other)
        with pytest.raises(CheckpointError, match=r"meta\.json is damaged .*, or delete .*step-00000006"):
            read_meta(path)
        found = readable_meta(tmp_path, ("step", "recipe"))
        assert found is not None
        assert (found["step"], found["recipe"]) == (3, "a")
    with pytest.raises(CheckpointError, match="it must hold seconds"):
        readable_meta(tmp_path, ("seconds",))
    assert readable_meta(tmp_path / "nowhere", ()) is None


def test_micro_batches_are_dealt_anew_to_other_ranks(tmp_path: Path) -> None:
    """What rank r kept for its micro-batch m was number m * ranks + r of the step."""
    path = save_checkpoint(OneRank(), tmp_path, {"step": 3}, extra=["a0", "a1"])
    other = torch.load(path / "rank-00000.pt") | {"extra": ["b0", "b1"]}
    torch.save(other, path / "rank-00001.pt")
    assert load_checkpoint(OneRank(), path) == ["a0", "b0", "a1", "b1"]
    one = torch.rand(3)
    third = OneRank()
    third.rank, third.world_size = 2, 4
    assert load_checkpoint(third, path) == ["a1"]
    assert not torch.equal(torch.rand(3), one)  # ranks draw apart
    load_checkpoint(OneRank(), path)
    assert torch.equal(torch.rand(3), one)  # and the same each time


def interrupted(out: Path, engine: dict[str, Any], **options: Any) -> None:
    with pytest.raises(Stop):
        trainer(out, toy(), engine=engine, save_every=3, on_step=stop_after(4, Stop()), **options).run()


LAYOUTS = [
    ({"zero_stage": 2}, {"zero_stage": 3}),
    ({"zero_stage": 3}, {"zero_stage": 1}),
    ({"zero_stage": 0}, {"zero_stage": 2, "offload": "cpu"}),
    ({"zero_stage": 3, "offload": "cpu"}, {"zero_stage": 0}),
    ({"zero_stage": 1, "dtype": "bfloat16"}, {"zero_stage": 3, "dtype": "bfloat16"}),
    ({"zero_stage": 3, "dtype": "bfloat16"}, {"zero_stage": 2, "dtype": "bfloat16", "bucket_elements": 64}),
]


@pytest.mark.parametrize("before, after", LAYOUTS)
def test_another_zero_stage_goes_on(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    straight, resumed = toy(), toy()
    trainer(tmp_path / "a", straight, engine=before).run()
    interrupted(tmp_path / "b", before)
    trainer(tmp_path / "b", resumed, engine=after).run()
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), abs=1e-5, rel=0)
    for name, value in values(straight).items():
        assert torch.allclose(value, values(resumed)[name], atol=1e-5), name


def test_a_resume_says_from_what(tmp_path: Path) -> None:
    interrupted(tmp_path, {"zero_stage": 2}, keep=2, changes={"steps": 8})
    console = Console(file=io.StringIO(), width=500)
    trainer(tmp_path, toy(), engine={"zero_stage": 3}, console=console, changes={"steps": 8}).run()
    assert "toy: resumes after step 3 of 8 (zero_stage: 2 -> 3)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    straight, resumed = toy(), toy()
    trainer(tmp_path / "a", straight).run()
    with pytest.raises(Stop):
        trainer(tmp_path / "b", toy(), save_every=2, keep=2, on_step=stop_after(5, Stop())).run()
    damage(tmp_path / "b" / "checkpoints" / "step-00000004" / "state-00000.safetensors", "flip")
    console = Console(file=io.StringIO(), width=500)
    trainer(tmp_path / "b", resumed, save_every=2, keep=2, console=console).run()
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "toy: set aside: " in printed
    assert "state-00000.safetensors is damaged (checksum " in printed
    assert "toy: resumes after step 2 of 6" in printed
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert all(torch.equal(value, values(resumed)[name]) for name, value in values(straight).items())
