"""Checkpoints of a run that any number of ranks at any ZeRO stage goes on from; to the bit where both are the same.

A folder `step-<n>` has, of each rank, `state-<rank>.safetensors` (the pieces that it updates: fp32 master weights and
Adam's moments by parameter name) and `rank-<rank>.pt` (random state, buffers, what a step keeps for the next one), and
`meta.json` with size and CRC-32 of all of them. What is frozen is not there: it comes from the base model, whose
fingerprint the recipe holds.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastmllm.train.checkpoint import CheckpointError, atomic_file, damaged, fingerprint, flush, full_disk
from fastmllm.train.inventory import NAME, Group, latest_checkpoint, remedy_for, remove_leftovers
from fastmllm.train.partition import Piece
from fastmllm.train.pieces import read_pieces, sums_of, write_pieces


class EngineLike(Group, Protocol):
    """Name what a checkpoint needs of `engine.Engine`."""

    model: nn.Module
    device: torch.device

    def pieces(self, *, own: bool = False) -> list[Piece]: ...
    def adopt_pieces(self) -> None: ...


# --- saving -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    engine: EngineLike, folder: Path, meta: Mapping[str, Any], *, keep: int = 1, extra: Sequence[Any] | None = None
) -> Path:
    """Write a checkpoint of all ranks; called by all of them.

    Args:
        engine: what holds trainable parameters and optimizer state.
        folder: of this run's checkpoints, the same one on all hosts.
        meta: JSON-able; `step` names the checkpoint.
        keep: newest checkpoints that stay; older ones are removed once this one is in place.
        extra: what else must be found again, a value (of plain values and tensors) for each micro-batch of a step.

    Returns:
        the checkpoint's folder.

    Raises:
        CheckpointError: some rank could not write; earlier checkpoints are intact.
    """
    final = folder / f"step-{meta['step']:08d}"
    name = engine.gather(f"{final.name}.tmp-{os.getpid()}")[0]
    temporary = folder / name
    problem: Exception | None = None
    try:
        if engine.rank == 0:
            remove_leftovers(folder)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    except OSError as error:
        problem = error
    _raise_together(engine, problem, temporary, final)

    files: dict[str, tuple[int, str]] = {}
    try:
        if not temporary.is_dir():
            raise OSError(f"rank {engine.rank} does not see what rank 0 made; all hosts must share this folder")
        files = _write_rank(engine, temporary, extra)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer turns a full disk into a RuntimeError
        problem = error
    _raise_together(engine, problem, temporary, final)

    shares = engine.gather(files)
    try:
        if engine.rank == 0:
            whole = dict(meta) | {"files": {name: sums for share in shares for name, sums in share.items()}}
            text = json.dumps(whole | {"checksum": fingerprint(whole)}, indent=1)
            (temporary / "meta.json").write_text(text, encoding="utf-8")
            flush(temporary / "meta.json")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            with atomic_file(folder / "latest") as pointer:
                pointer.write_text(final.name, encoding="utf-8")
            for old in sorted(folder.glob(NAME))[: -max(1, keep)]:
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
    except (OSError, CheckpointError) as error:
        problem = error
    _raise_together(engine, problem, temporary, final)
    return final


def _write_rank(engine: EngineLike, folder: Path, extra: Sequence[Any] | None) -> dict[str, tuple[int, str]]:
    """Write this rank's files; return size and checksum of each."""
    state, rest = folder / f"state-{engine.rank:05d}.safetensors", folder / f"rank-{engine.rank:05d}.pt"
    write_pieces(engine.pieces(own=True), state)
    keep = {"extra": None if extra is None else list(extra), "buffers": _buffers(engine.model)}
    torch.save(_rng_state(engine.device) | keep, rest)
    for path in (state, rest):
        flush(path)
    return {path.name: sums_of(path) for path in (state, rest)}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if not _is_parameter(value)}


def _is_parameter(value: Any) -> bool:
    return isinstance(value, nn.Parameter) or not isinstance(value, Tensor)


def _rng_state(device: torch.device) -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def _raise_together(engine: EngineLike, problem: Exception | None, temporary: Path, final: Path) -> None:
    """Raise on every rank when one rank has a problem, so that none waits for a rank that left."""
    problems = [text for text in engine.gather(None if problem is None else str(problem) or repr(problem)) if text]
    if not problems:
        return
    if engine.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    earlier = latest_checkpoint(final.parent)
    kept = f"the checkpoint {earlier.name} is intact" if earlier else "no earlier checkpoint exists"
    raise CheckpointError(full_disk(final, problems[0].strip().splitlines()[0], kept)) from problem


# --- loading ----------------------------------------------------------------------------------------------------


def load_checkpoint(engine: EngineLike, checkpoint: Path) -> list[Any] | None:
    """Bring parameters, optimizer state, buffers and random state of a checkpoint back; called by all ranks.

    As many ranks as wrote it go on to the bit. Others get the same state, shared out anew, and random numbers of their
    own, the same ones each time that they resume from it.

    Returns:
        what was given as `extra` for each micro-batch of this rank's step.
    """
    ranks = len(list(checkpoint.glob("rank-*.pt")))
    problem: Exception | None = None
    extra = None
    try:
        files = sorted(checkpoint.glob("state-*.safetensors"))
        at = engine.rank * len(files) // engine.world_size
        read_pieces(engine.pieces(), files[at:] + files[:at])
        extra = _load_rank(engine, checkpoint, ranks)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        problem = damaged(checkpoint, error, remedy_for(checkpoint))
    if told := [text for text in engine.gather(None if problem is None else str(problem)) if text]:
        raise CheckpointError(told[0]) from problem
    engine.adopt_pieces()
    return extra


def _load_rank(engine: EngineLike, checkpoint: Path, ranks: int) -> list[Any] | None:
    same = ranks == engine.world_size
    own = _read_rank(checkpoint, engine.rank if same else 0)
    for name, value in _buffers(engine.model).items():
        value.copy_(own["buffers"][name])
    if same:
        torch.set_rng_state(own["cpu"])
        if "device" in own and engine.device.type == "cuda":
            torch.cuda.set_rng_state(own["device"], engine.device)
        extra: list[Any] | None = own["extra"]
        return extra
    torch.manual_seed((zlib.crc32(own["cpu"].numpy().tobytes()) << 20) + engine.rank)
    if own["extra"] is None:
        return None
    # micro-batch m of rank r was number m * ranks + r of its step
    of_rank = [own["extra"], *(_read_rank(checkpoint, rank)["extra"] for rank in range(1, ranks))]
    return [value for micro in zip(*of_rank, strict=True) for value in micro][engine.rank :: engine.world_size]


def _read_rank(checkpoint: Path, rank: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(checkpoint / f"rank-{rank:05d}.pt", weights_only=True, map_location="cpu")
    return state
