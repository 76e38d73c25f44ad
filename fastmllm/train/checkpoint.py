"""What survives a stop: files that are whole or absent, exported weights, and the identity of runs and weights.

Everything is written under a temporary name, then renamed; a write that fails leaves what was there.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fastmllm.data.cache import atomic_path


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another run."""


# --- identity ---------------------------------------------------------------------------------------------------


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits of a JSON-able value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_fingerprint(model: nn.Module, *, trainable: bool | None = None) -> str:
    """Return 16 hexadecimal digits of names, shapes and bits of the parameters that learn, of all others, or of all.

    Args:
        model: parameters whole, that is before an engine partitions them.
        trainable: which half; the frozen half includes the buffers of its state dict. None: both, whatever learns.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if trainable not in (None, isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            continue
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        # crc32, not sha256, over the bits: a gigabyte must take a second, and nobody forges weights here.
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {zlib.crc32(data):08x}\n".encode())
    return digest.hexdigest()[:16]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """List what differs between two JSON-able values, as "key: old -> new"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old} -> {new}"]


# --- atomic writing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; rename it to path when the body succeeds, remove it when it fails.

    Raises:
        CheckpointError: the body or the rename failed to write; names the space left.
    """
    try:
        with atomic_path(path) as temporary:
            yield temporary
            flush(temporary)
    except Exception as error:
        if is_write_problem(error):
            raise CheckpointError(full_disk(path, str(error), "what was there before is intact")) from error
        raise


def is_write_problem(error: Exception) -> bool:
    """True for an OSError and for the errors that torch and safetensors make of one."""
    if isinstance(error, OSError):
        return True
    return isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error)


def full_disk(path: Path, problem: str, kept: str) -> str:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**20
    return f"cannot write {path}: {problem} ({free:,.0f} MiB free there); {kept}. Free space, then run the same again"


def flush(path: Path) -> None:
    """Wait until a file is on the disk, so that the rename cannot get there first."""
    with path.open("rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise


def read_json(path: Path, needed: Sequence[str], remedy: str) -> dict[str, Any]:
    """Read a file of a run and see that it holds what it should.

    Raises:
        CheckpointError: damaged, with the remedy.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or any(key not in found for key in needed):
            raise ValueError(f"it must hold {', '.join(needed)}")
    except ValueError as error:
        raise damaged(path, error, remedy) from error
    return found


def damaged(path: Path, error: Exception, remedy: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({(str(error) or repr(error)).splitlines()[0]}); {remedy}")


def set_aside(folder: Path) -> Path:
    """Rename a folder to <folder>.old-<n>, so that nothing that was saved is lost; return the new path."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.replace(folder, target)
    return target


# --- exported weights -------------------------------------------------------------------------------------------


def save_trainable(model: nn.Module, path: Path | str, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write the parameters that learn, and the buffers beside them, as safetensors; atomic.

    Args:
        model: parameters whole (after `Engine.close`).
        path: a .safetensors file.
        metadata: strings for the file's header.

    Raises:
        CheckpointError: the file could not be written; an earlier one is intact.
    """
    tensors: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        params = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
        if params:
            hidden = module._non_persistent_buffers_set
            buffers = {n: b for n, b in module.named_buffers(recurse=False) if n not in hidden}
            for name, tensor in (params | buffers).items():
                tensors[f"{prefix}.{name}" if prefix else name] = (
                    tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                )
    with atomic_file(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata or {}))


def load_trainable(model: nn.Module, path: Path | str) -> dict[str, str]:
    """Copy the tensors of a `save_trainable` file into a model, cast to its dtypes.

    Returns:
        the file's metadata.

    Raises:
        CheckpointError: the file is missing or damaged, or a tensor has no place of its name and shape in the model;
            nothing is copied.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: the weights are missing; put the file back")
    try:
        return _load_trainable(model, path)
    except SafetensorError as error:
        raise damaged(path, error, "put a whole copy there") from error


def _load_trainable(model: nn.Module, path: Path) -> dict[str, str]:
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    with safe_open(str(path), framework="pt") as file:
        names = list(file.keys())
        for name in names:
            if name not in own:
                near = difflib.get_close_matches(name, own, n=3)
                raise CheckpointError(f"{path}: {name} is not in this model; near names: {', '.join(near) or 'none'}")
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(own[name].shape):
                raise CheckpointError(f"{path}: {name} is {shape} in the file, {tuple(own[name].shape)} in this model")
        with torch.no_grad():
            for name in names:
                own[name].copy_(file.get_tensor(name))
        return dict(file.metadata() or {})
