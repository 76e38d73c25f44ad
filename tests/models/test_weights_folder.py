"""Checkpoint folders: shards go there and back; damage, pickles and paths outside are refused by name."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastmllm.models.weights.folder import INDEX, SINGLE, read_config, read_state, write_folder

STATE = {f"w{i}": torch.randn(4, 8) for i in range(5)}


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("max_shard_bytes", [1, 300, 10**9])
def test_weights_go_there_and_back(tmp_path, max_shard_bytes):
    write_folder(tmp_path, {"model_type": "x"}, STATE, max_shard_bytes)
    assert (tmp_path / INDEX).is_file() == (max_shard_bytes < 10**9)
    found = read_state(tmp_path)
    assert equal(found, STATE)
    assert read_config(tmp_path) == {"model_type": "x"}
    write_folder(tmp_path, {}, {"w0": STATE["w0"]})  # a smaller one in the same place leaves nothing of the first
    assert list(read_state(tmp_path)) == ["w0"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", SINGLE]


def test_a_truncated_file_is_named(tmp_path):
    write_folder(tmp_path, {}, STATE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        read_state(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        read_state(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors"])
def test_a_path_outside_of_the_folder_is_not_followed(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="outside of its folder"):
        read_state(tmp_path)


def test_an_index_that_names_a_pickle_or_lies_is_refused(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": "pytorch_model.bin"}}))
    with pytest.raises(ValueError, match="only safetensors"):
        read_state(tmp_path)
    write_folder(tmp_path, {}, STATE, 300)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["w0"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="promises ghost"):
        read_state(tmp_path)


@pytest.mark.parametrize(("stray", "place"), [("w0", "assigns to model-00001-of-00003"), ("more", "does not know")])
def test_a_shard_holds_what_the_index_assigns_to_it(tmp_path, stray, place):
    write_folder(tmp_path, {}, STATE, 300)
    last = tmp_path / json.loads((tmp_path / INDEX).read_text())["weight_map"]["w4"]
    save_file({"w4": STATE["w4"], stray: torch.zeros(4, 8)}, last)
    with pytest.raises(ValueError, match=f"{last.name} has {stray}, which {INDEX} {place}"):
        read_state(tmp_path)


def test_a_single_file_goes_before_an_index(tmp_path):
    write_folder(tmp_path, {}, STATE, 300)
    save_file({"w0": torch.ones(2)}, tmp_path / SINGLE)
    assert read_state(tmp_path)["w0"].shape == (2,)


class Killed(BaseException):
    """Nothing catches it, as nothing catches a signal."""


WRITING = {"save": (safetensors.torch, "save_file"), "json": (Path, "write_text")}
MOVING = {"rename": (os, "replace"), "unlink": (Path, "unlink")}


@pytest.mark.parametrize("error", [OSError("disk full"), Killed()])
@pytest.mark.parametrize(("before", "after"), [(300, 300), (300, 10**9), (10**9, 300), (10**9, 10**9)])
@pytest.mark.parametrize("what", [*WRITING, *MOVING])
def test_a_save_that_ends_early_leaves_one_checkpoint_whole(tmp_path, monkeypatch, what, before, after, error):
    """Each call in turn fails: the weights are all of one checkpoint, and the earlier one's until all is written."""
    owner, name = (WRITING | MOVING)[what]
    real, new = getattr(owner, name), {key: tensor + 1 for key, tensor in STATE.items()}
    outcomes = set()
    for at in range(12):
        folder = tmp_path / str(at)
        write_folder(folder, {"model_type": "x"}, STATE, before)
        countdown = iter([False] * at + [True])

        def limping(*args, countdown=countdown, **kwargs):
            if next(countdown, False):
                raise error
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, limping)
            try:
                write_folder(folder, {"model_type": "x"}, new, after)
                allowed = {"new"}
            except type(error):
                allowed = {"old"} if what in WRITING else {"old", "new"}
        found = read_state(folder)
        whole = {label for label, state in (("old", STATE), ("new", new)) if equal(found, state)}
        assert len(whole) == 1, at
        assert whole <= allowed, at
        outcomes |= whole
        assert read_config(folder) == {"model_type": "x"}
        write_folder(folder, {}, new, after)  # the next save leaves nothing of the one that failed
        assert equal(read_state(folder), new)
        assert len(list(folder.glob("*.safetensors"))) == (3 if after == 300 else 1)
    assert outcomes == {"old", "new"} or what == "unlink"


def test_a_full_disk_is_an_os_error_and_what_is_not_a_shard_stays(tmp_path, monkeypatch):
    (tmp_path / "model_ema.safetensors").touch()

    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="cannot be written to: No space left on device"):
        write_folder(tmp_path, {}, STATE)
    monkeypatch.undo()
    write_folder(tmp_path, {}, STATE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", SINGLE, "model_ema.safetensors"]


def test_a_link_is_followed(tmp_path):
    write_folder(tmp_path / "blobs", {}, STATE)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / SINGLE).symlink_to(tmp_path / "blobs" / SINGLE)
    assert read_state(tmp_path / "snapshot").keys() == STATE.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"), ("[]", "no JSON object"), ("9" * 5000, "is not JSON"), ("[" * 10**5, "is not JSON"),
    ],
)  # fmt: skip
def test_a_bad_config_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_config(tmp_path / "elsewhere")
