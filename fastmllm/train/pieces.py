"""Files of pieces of parameters: written by any number of ranks, read by any other number, and checked."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmllm.train.partition import Piece

CHUNK = 1 << 24  # bytes read at a time


def write_pieces(pieces: Iterable[Piece], path: Path) -> None:
    """Write a rank's pieces as safetensors: "<kind>/<parameter>", where each starts and its step in the header."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, tuple[int, int, float]] = {}
    for piece in pieces:
        places[piece.name] = (piece.start, len(piece.tensors["master"]), float(piece.step))
        tensors |= {f"{kind}/{piece.name}": value.contiguous() for kind, value in piece.tensors.items()}
    save_file(tensors, path, metadata={"pieces": json.dumps(places)})


def read_pieces(pieces: Sequence[Piece], files: Sequence[Path]) -> None:
    """Fill pieces from the files of all ranks, however these had shared the parameters out.

    Only the elements that are needed are read, and no more files than hold them.

    Args:
        pieces: to be filled in place.
        files: of one checkpoint; the one that probably fits first.

    Raises:
        ValueError: elements that no file holds; nothing says which of the pieces are filled then.
    """
    missing = {(piece.name, piece.start): len(piece.tensors["master"]) for piece in pieces}
    steps: dict[int, float] = {}
    for path in files:
        if not any(missing.values()):
            break
        with safe_open(str(path), framework="pt") as file:
            places = json.loads((file.metadata() or {})["pieces"])
            for piece in pieces:
                if piece.name not in places:
                    continue
                start, size, step = places[piece.name]
                first = max(start, piece.start)
                last = min(start + size, piece.start + len(piece.tensors["master"]))
                if first >= last:
                    continue
                for kind, value in piece.tensors.items():
                    part = file.get_slice(f"{kind}/{piece.name}")[first - start : last - start]
                    value[first - piece.start : last - piece.start].copy_(part)
                # shared by parameters, of which some may never have had a gradient at stage 0
                steps[id(piece.step)] = max(step, steps.get(id(piece.step), 0.0))
                piece.step.fill_(steps[id(piece.step)])
                missing[piece.name, piece.start] -= last - first
    if lacking := [f"{count} elements of {name}" for (name, _), count in missing.items() if count]:
        raise ValueError(f"the files lack {', '.join(lacking[:4])}")


def sums_of(path: Path) -> tuple[int, str]:
    """Return size in bytes and CRC-32 of a file."""
    size, checksum = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, f"{checksum:08x}"
