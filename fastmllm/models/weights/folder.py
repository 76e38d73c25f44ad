"""Checkpoint folders: config.json and safetensors, one file or shards, in and out.

Nothing of a checkpoint is executed: no pickle is opened, and code beside the weights is not looked at.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model(-\d+)?-\d{5}-of-\d{5}\.safetensors")
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

    Links inside the folder are followed, as the Hub's cache is made of them; an index may name files of the folder,
    never paths. A shard holds what the index assigns to it and nothing else: of a tensor in two shards transformers
    takes the last, whatever the index says, so that one of the two readings would be silently wrong.

    Raises:
        FileNotFoundError: no safetensors, or a shard that the index names is missing.
        ValueError: a damaged file, an index that disagrees with its shards or names a path, or pickled weights only.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return _read_file(folder, SINGLE)
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"fastmllm::weights: {index} has no weight_map from tensors to files")
    state: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        shard = _read_file(folder, name)
        if stray := sorted(key for key in shard if where.get(key) != name):
            place = f"assigns to {where[stray[0]]}" if stray[0] in where else "does not know"
            raise ValueError(
                f"fastmllm::weights: {folder / name} has {stray[0]}, which {INDEX} {place}; save the checkpoint again"
            )
        state |= shard
    if missing := sorted(set(where) - set(state)):
        raise ValueError(f"fastmllm::weights: {index} promises {missing[0]}, which {where[missing[0]]} lacks")
    return state


def write_folder(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write weights and config.json so that an earlier checkpoint in the folder is readable until this one is.

    All files are written under temporary names first. Then shards are put in their place, under names that no earlier
    one has, then model.safetensors or the index, then config.json; what only the earlier checkpoint had goes last.
    Killed between these renames, the folder may have the config.json of one checkpoint and the weights of the other;
    both sets of shards are still there.

    Args:
        folder: made if absent.
        config: config.json.
        state: the checkpoint's names; tensors that share memory must be given once.
        max_shard_bytes: a file holds at most this much, or one tensor.

    Raises:
        OSError: the disk is full; what stood in the folder before is still there.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    names = [SINGLE] if len(shards) == 1 else _new_names(folder, len(shards))
    with ExitStack() as stack:  # the last one in is the first to be put in its place
        _stage_json(stack, folder / "config.json", config)
        if len(shards) > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(tensor.nbytes for tensor in state.values())
            _stage_json(stack, folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        for name, shard in zip(names, shards, strict=True):
            _save(shard, stack.enter_context(renamed(folder / name)))
    for old in (SINGLE, INDEX, *sorted(file.name for file in folder.iterdir() if _SHARD.fullmatch(file.name))):
        if old not in names and (old != INDEX or len(shards) == 1):
            (folder / old).unlink(missing_ok=True)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file beside its place and rename it."""
    with ExitStack() as stack:
        _stage_json(stack, file, content)


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


def _stage_json(stack: ExitStack, file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file beside its place; it gets there when the stack ends well."""
    target = stack.enter_context(renamed(file))
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _flush(target)


def _new_names(folder: Path, number: int) -> list[str]:
    """Name shards as transformers does, with a number behind "model" where an earlier checkpoint has these names."""
    stems = chain(("model",), (f"model-{k}" for k in count(2)))
    series = ([f"{stem}-{k:05d}-of-{number:05d}.safetensors" for k in range(1, number + 1)] for stem in stems)
    return next(names for names in series if not any((folder / name).exists() for name in names))


def _save(state: dict[str, Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"fastmllm::weights: {file.parent} cannot be written to: {error}") from error
    _flush(file)


def _flush(file: Path) -> None:
    """Wait until a file is on the disk: a rename must not get there first."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"fastmllm::weights: {file.parent} has no {file.name}; is it a Hugging Face model folder?"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
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
