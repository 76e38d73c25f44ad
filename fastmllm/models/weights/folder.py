"""Checkpoint folders: config.json and safetensors, one file or shards, in and out.

Nothing of a checkpoint is executed: no pickle is opened, and code beside the weights is not looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object.
    """
    return _read_json(folder / "config.json")


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read all weights of a folder: model.safetensors where there is one, as transformers does, otherwise its shards.

    Of a shard only that is taken which the index assigns to it. Links inside the folder are followed, as the Hub's cache
    is made of them; an index may name files of the folder, never paths.

    Raises:
        FileNotFoundError: no safetensors, or a shard that the index names is missing.
        ValueError: a damaged file, an index that disagrees with its shards or names a path, or pickled weights only.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return _read_file(folder, SINGLE)
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"fastmllm::weights: {index} has no weight_map from tensors to files")
    state: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        shard = _read_file(folder, name)
        if unknown := sorted(set(shard) - set(where)):
            raise ValueError(f"fastmllm::weights: {folder / name} has {unknown[0]}, which {INDEX} does not know")
        state |= {key: tensor for key, tensor in shard.items() if where[key] == name}
    if missing := sorted(set(where) - set(state)):
        raise ValueError(f"fastmllm::weights: {index} promises {missing[0]}, which {where[missing[0]]} lacks")
    return state


def write_folder(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write weights, then config.json, which makes the folder readable; each file beside its place, then renamed.

    Args:
        folder: made if absent.
        config: config.json.
        state: the checkpoint's names; tensors that share memory must be given once.
        max_shard_bytes: a file holds at most this much, or one tensor.

    Raises:
        OSError: the disk is full; what stood in the folder before is still there.
    """
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        with renamed(folder / name) as target:
            save_file(shard, target, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(
            folder / INDEX, {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": where}
        )
    for old in folder.glob("model*.safetensors"):  # of an earlier checkpoint in the same folder
        if old.name not in names:
            old.unlink()
    if len(shards) == 1:
        (folder / INDEX).unlink(missing_ok=True)
    write_json(folder / "config.json", config)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file beside its place and rename it."""
    with renamed(file) as target:
        target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def renamed(file: Path) -> Iterator[Path]:
    """Yield a path beside `file` to write to; it becomes `file` only if the block ends well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"fastmllm::weights: {file.parent} has no {file.name}; is it a Hugging Face model folder?"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"fastmllm::weights: {file} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"fastmllm::weights: {file} is no JSON object")
    return content


def _read_file(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if Path(name).name != name or "\\" in name:
        raise ValueError(f"fastmllm::weights: {folder / INDEX} points outside of its folder, at {name!r}; not followed")
    if not name.endswith(".safetensors"):
        raise ValueError(f"fastmllm::weights: {folder / INDEX} names {name!r}; only safetensors are opened here")
    file = folder / name
    if not file.is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"fastmllm::weights: {folder} has pickled weights only ({pickles[0]}), which may run code when opened; "
                "convert them: from_pretrained(...) and save_pretrained(...) in transformers write safetensors"
            )
        raise FileNotFoundError(f"fastmllm::weights: {folder} has no {name}; save the weights as safetensors")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"fastmllm::weights: {file} is damaged ({error}); download it again") from error
