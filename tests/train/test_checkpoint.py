from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from train_toy import RULES, toy

from fastmllm.train.checkpoint import (
    CheckpointError,
    atomic_file,
    differences,
    fingerprint,
    latest_checkpoint,
    load_checkpoint,
    load_trainable,
    model_fingerprint,
    read_meta,
    remove_leftovers,
    save_checkpoint,
    save_trainable,
    set_aside,
)
from fastmllm.train.rules import apply_rules


class OneRank:
    """An engine that keeps one tensor."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, size: int = 100) -> None:
        self.tensor = torch.arange(size, dtype=torch.float32)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def save(self, folder: Path, tag: str) -> Exception | None:
        try:
            torch.save(self.tensor, folder / tag / "state.pt")
        except (OSError, RuntimeError) as error:
            return error
        return None

    def load(self, folder: Path, tag: str) -> None:
        self.tensor = torch.load(folder / tag / "state.pt", weights_only=True)


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Let no file grow beyond a size: writes fail half-way, as on a full disk (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_comes_back_with_its_random_state(tmp_path: Path) -> None:
    engine = OneRank()
    torch.manual_seed(5)
    path = save_checkpoint(engine, tmp_path, {"step": 3, "recipe": {"a": 1}}, extra={"tokens": [[1], [2, 3]]})
    expected = torch.rand(4)
    engine.tensor = torch.zeros(1)
    assert latest_checkpoint(tmp_path) == path
    assert read_meta(path)["recipe"] == {"a": 1}
    assert load_checkpoint(engine, path) == {"tokens": [[1], [2, 3]]}
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(engine.tensor, torch.arange(100.0))


def test_old_checkpoints_go_once_the_new_one_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(OneRank(), tmp_path, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]


def test_a_write_that_fails_half_way_keeps_the_last(tmp_path: Path) -> None:
    first = save_checkpoint(OneRank(), tmp_path, {"step": 3})
    with small_files(8192), pytest.raises(CheckpointError) as raised:
        save_checkpoint(OneRank(100_000), tmp_path, {"step": 6})
    message = str(raised.value)
    assert "step-00000006" in message
    assert "step-00000003 is intact" in message
    assert "MiB free" in message
    assert latest_checkpoint(tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]
    engine = OneRank(1)
    load_checkpoint(engine, first)
    assert torch.equal(engine.tensor, torch.arange(100.0))


@pytest.mark.parametrize("where", ["mkdir", "meta", "replace"])
def test_a_full_disk_anywhere_keeps_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    first = save_checkpoint(OneRank(), tmp_path, {"step": 3})

    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target, name = {"mkdir": (Path, "mkdir"), "meta": (Path, "write_text"), "replace": (os, "replace")}[where]
    monkeypatch.setattr(target, name, full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(OneRank(), tmp_path, {"step": 6})
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == first
    assert not list(tmp_path.glob("*.tmp-*"))


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from fastmllm.train.checkpoint import save_checkpoint
class Engine:
    rank, world_size, device = 0, 1, torch.device("cpu")
    step = 0
    def gather(self, value): return [value]
    def save(self, folder, tag):
        (folder / tag / "state.pt").write_bytes(b"half of it")
        if self.step: os.kill(os.getpid(), signal.SIGKILL)
engine = Engine()
save_checkpoint(engine, Path(sys.argv[1]), {"step": 3})
engine.step = 6
save_checkpoint(engine, Path(sys.argv[1]), {"step": 6})
"""


def test_a_kill_during_the_write_keeps_the_last(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [path.name.split("-")[1] for path in tmp_path.glob("*.tmp-*")] == ["00000006.tmp"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert read_meta(latest)["step"] == 3
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_a_kill_between_the_two_renames_is_seen(tmp_path: Path) -> None:
    save_checkpoint(OneRank(), tmp_path, {"step": 3})
    path = save_checkpoint(OneRank(), tmp_path, {"step": 6})
    (tmp_path / "latest").write_text("step-00000003")  # removed by keep=1: the pointer is stale
    assert latest_checkpoint(tmp_path) == path
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_atomic_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"

    def write(text: str, problem: Exception | None = None) -> None:
        with atomic_file(path) as temporary:
            temporary.write_text(text)
            if problem is not None:
                raise problem

    write("one")
    with pytest.raises(CheckpointError, match="what was there before is intact"):
        write("two", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(KeyError):
        write("three", KeyError())
    assert path.read_text() == "one"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_fingerprints() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2, "d": 4}) == ["a.b: 1 -> 3", "d: None -> 4"]
    model = toy()
    apply_rules(model, RULES)
    frozen, learning = model_fingerprint(model, trainable=False), model_fingerprint(model, trainable=True)
    with torch.no_grad():
        model.connector[0].weight[0, 0] += 1
    assert model_fingerprint(model, trainable=False) == frozen
    assert model_fingerprint(model, trainable=True) != learning
    with torch.no_grad():
        model.language.embed.weight[7, 3] *= 1.0001
    assert model_fingerprint(model, trainable=False) != frozen
    whole = model_fingerprint(model)
    model.requires_grad_(False)
    assert model_fingerprint(model) == whole == model_fingerprint(model, trainable=False)
    with torch.no_grad():
        model.connector[0].weight[0, 0] += 1
    assert model_fingerprint(model) != whole


def test_trainable_weights_travel(tmp_path: Path) -> None:
    model = toy(seed=1)
    apply_rules(model, RULES)
    path = tmp_path / "weights.safetensors"
    save_trainable(model, path, metadata={"stage": "toy"})
    with safe_open(str(path), "pt") as file:
        assert set(file.keys()) == {name for name, param in model.named_parameters() if param.requires_grad}
    other = toy(seed=2).to(torch.bfloat16)
    before = other.language.embed.weight.clone()
    assert load_trainable(other, path) == {"stage": "toy"}
    assert torch.equal(other.connector[0].weight, model.connector[0].weight.bfloat16())
    assert torch.equal(other.language.embed.weight, before)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    model = toy()
    apply_rules(model, {"connector.*": 1e-3})
    save_trainable(model, path)
    with pytest.raises(CheckpointError, match=r"connector\.0\.bias is \(16,\) in the file, \(8,\) in this"):
        load_trainable(toy(width=8), path)
    with pytest.raises(CheckpointError, match=r"connector\.0\.bias is not in this model"):
        load_trainable(nn.Linear(2, 2), path)


def test_damaged_and_missing_weights_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    model = toy()
    apply_rules(model, RULES)
    save_trainable(model, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged \(.+\); put a whole"):
        load_trainable(toy(), path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: the weights are missing; put"):
        load_trainable(toy(), path)


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    path = save_checkpoint(OneRank(), tmp_path, {"step": 3, "seconds": 1.0, "recipe": {}, "layout": {}})
    for file in (path / "rng-0.pt", path / "engine" / "state.pt"):
        before = file.read_bytes()
        file.write_bytes(before[:20])
        with pytest.raises(CheckpointError, match=r"step-00000003 is damaged .*; delete .*step-00000003, then the run"):
            load_checkpoint(OneRank(), path)
        file.write_bytes(before)
    for text in ("{", "[]", '{"seconds": 3}', "3"):
        (path / "meta.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"meta\.json is damaged .*; delete .*step-00000003"):
            read_meta(path)


def test_buffers_beside_trainable_weights_are_exported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    apply_rules(model, {"1.*": 1e-3})
    save_trainable(model, tmp_path / "w")
    with safe_open(str(tmp_path / "w"), "pt") as file:
        assert set(file.keys()) == {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_a_full_disk_keeps_the_exported_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    model = toy(width=64)
    apply_rules(model, RULES)
    save_trainable(model, path)
    before = path.read_bytes()
    with small_files(8192), pytest.raises(CheckpointError, match="what was there before is intact"):
        save_trainable(model, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.safetensors"]


def test_set_aside_loses_nothing(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "file").write_text(text)
        set_aside(tmp_path / "run")
    assert (tmp_path / "run.old-1" / "file").read_text() == "one"
    assert (tmp_path / "run.old-2" / "file").read_text() == "two"
