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

from fastmllm.train.checkpoint import CheckpointError, atomic_file, damaged, fingerprint, flush, full_disk, read_json
from fastmllm.train.partition import Piece
from fastmllm.train.pieces import read_pieces, sums_of, write_pieces

NAME = "step-????????"


class EngineLike(Protocol):
    """Name what a checkpoint needs of `engine.Engine`."""

    model: nn.Module
    rank: int
    world_size: int
    device: torch.device

    def gather(self, value: Any) -> list[Any]: ...
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


def remove_leftovers(folder: Path) -> None:
    """Remove half-written checkpoints whose process is gone."""
    for path in folder.glob("*.tmp-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """True while a process of this host runs; one that has ended and is only not collected yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{pid}/stat")  # of Linux alone
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


# --- finding ----------------------------------------------------------------------------------------------------


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint's folder, or None; nothing in it is checked."""
    found = _newest_first(folder)
    return found[0] if found else None


def _newest_first(folder: Path) -> list[Path]:
    # The renaming makes a folder complete; `latest` is for people, and may be one behind after a kill.
    return [path for path in sorted(folder.glob(NAME), reverse=True) if (path / "meta.json").exists()]


def read_meta(checkpoint: Path, needed: Sequence[str] = ("step",)) -> dict[str, Any]:
    """Return what `save_checkpoint` was given as meta, and `files`.

    Raises:
        CheckpointError: damaged, or one of the needed keys is missing.
    """
    path, remedy = checkpoint / "meta.json", _remedy(checkpoint)
    meta = read_json(path, (*needed, "files", "checksum"), remedy)
    if meta.pop("checksum") != fingerprint(meta):
        raise damaged(path, ValueError("its checksum is another one"), remedy)
    return meta


def _remedy(checkpoint: Path) -> str:
    return f"put a whole copy there, or delete {checkpoint}, then the run starts from an earlier step"


def readable_meta(folder: Path, needed: Sequence[str]) -> dict[str, Any] | None:
    """Return the newest meta that can be read, None without checkpoints; this process alone looks.

    Raises:
        CheckpointError: there are checkpoints and none can be read.
    """
    problem: CheckpointError | None = None
    for path in _newest_first(folder):
        try:
            return read_meta(path, needed)
        except CheckpointError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def find_checkpoint(engine: EngineLike, folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint of which every file is what was written; called by all ranks, which share the work.

    Damaged ones that are newer are renamed to `<name>.damaged`.

    Returns:
        the checkpoint's folder, None without any; what was wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    problems: list[str] = []
    found = _newest_first(folder)
    for path in found:
        wrong: str | None = None
        try:
            _verify(path, engine.rank, engine.world_size)
        except CheckpointError as error:
            wrong = str(error)
        if not (told := [text for text in engine.gather(wrong) if text]):
            if engine.rank == 0:
                for bad in found[: found.index(path)]:
                    _rename_damaged(bad)
            engine.gather(None)
            return path, problems
        problems.append(told[0])
    if problems:
        raise CheckpointError("; ".join(problems))
    return None, []


def _rename_damaged(path: Path) -> None:
    target = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)  # an earlier one of the same step
    os.replace(path, target)


def _verify(checkpoint: Path, rank: int, ranks: int) -> None:
    """Check every `ranks`-th file of a checkpoint.

    Raises:
        CheckpointError: one is missing, shorter or different.
    """
    for name, (size, checksum) in sorted(read_meta(checkpoint)["files"].items())[rank::ranks]:
        path = checkpoint / name
        try:
            found = sums_of(path)
        except OSError as error:
            raise damaged(path, error, _remedy(checkpoint)) from error
        if found != (size, checksum):
            what = f"{found[0]} of {size} bytes" if found[0] != size else f"checksum {found[1]}, written was {checksum}"
            raise damaged(path, ValueError(what), _remedy(checkpoint))


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
        problem = damaged(checkpoint, error, _remedy(checkpoint))
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
