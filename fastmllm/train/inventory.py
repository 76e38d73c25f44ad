"""Which checkpoints of a run there are, which of them are whole, and what unfinished ones are left over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastmllm.train.checkpoint import CheckpointError, damaged, fingerprint, read_json
from fastmllm.train.pieces import sums_of

NAME = "step-????????"


class Group(Protocol):
    """Name what is needed of ranks that work together."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]: ...


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
    return (_stat(pid) or "?")[0] not in "ZX"


def is_sibling(pid: int) -> bool:
    """True for a process of this host with this one's parent, such as torchrun; False where nobody can tell."""
    stat = _stat(pid)
    return len(stat) > 1 and int(stat[1]) == os.getppid()


def _stat(pid: int) -> list[str]:
    """Return state, parent and what follows in the list of processes; nothing where there is none (Linux has one)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


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
    path, remedy = checkpoint / "meta.json", remedy_for(checkpoint)
    meta = read_json(path, (*needed, "files", "checksum"), remedy)
    if meta.pop("checksum") != fingerprint(meta):
        raise damaged(path, ValueError("its checksum is another one"), remedy)
    return meta


def remedy_for(checkpoint: Path) -> str:
    """Return what to do about a damaged checkpoint."""
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


def find_checkpoint(engine: Group, folder: Path) -> tuple[Path | None, list[str]]:
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
            raise damaged(path, error, remedy_for(checkpoint)) from error
        if found != (size, checksum):
            what = f"{found[0]} of {size} bytes" if found[0] != size else f"checksum {found[1]}, written was {checksum}"
            raise damaged(path, ValueError(what), remedy_for(checkpoint))
