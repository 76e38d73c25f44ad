from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    load_trainable,
    model_fingerprint,
    save_trainable,
    set_aside,
)
from fastmllm.train.rules import apply_rules


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Let no file grow beyond a size: writes fail half-way, as on a full disk (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
