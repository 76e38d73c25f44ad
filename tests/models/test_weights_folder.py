"""Checkpoint folders: shards go there and back; damage, pickles and paths outside are refused by name."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from fastmllm.models.weights.folder import INDEX, SINGLE, read_config, read_state, write_folder

STATE = {f"w{i}": torch.randn(4, 8) for i in range(5)}


@pytest.mark.parametrize("max_shard_bytes", [1, 300, 10**9])
def test_weights_go_there_and_back(tmp_path, max_shard_bytes):
    write_folder(tmp_path, {"model_type": "x"}, STATE, max_shard_bytes)
    assert (tmp_path / INDEX).is_file() == (max_shard_bytes < 10**9)
    found = read_state(tmp_path)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[k], STATE[k]) for k in STATE)
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


def test_a_shard_gives_only_what_the_index_assigns_to_it(tmp_path):
    write_folder(tmp_path, {}, STATE, 300)
    last = tmp_path / json.loads((tmp_path / INDEX).read_text())["weight_map"]["w4"]
    save_file({"w4": STATE["w4"], "w0": torch.zeros(4, 8)}, last)
    assert torch.equal(read_state(tmp_path)["w0"], STATE["w0"])
    save_file({"w4": STATE["w4"], "more": torch.zeros(1)}, last)
    with pytest.raises(ValueError, match=f"{last.name} has more, which {INDEX} does not know"):
        read_state(tmp_path)
    save_file({"w0": torch.ones(2)}, tmp_path / SINGLE)  # a single file goes before an index
    assert read_state(tmp_path)["w0"].shape == (2,)


def test_a_link_is_followed(tmp_path):
    write_folder(tmp_path / "blobs", {}, STATE)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / SINGLE).symlink_to(tmp_path / "blobs" / SINGLE)
    assert read_state(tmp_path / "snapshot").keys() == STATE.keys()


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "no JSON object")])
def test_a_bad_config_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_config(tmp_path / "elsewhere")
