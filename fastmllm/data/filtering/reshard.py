"""Write the samples of a list into new WebDataset shards: the same list gives the same bytes, on any machine."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fastmllm.data.byte_range import ByteRange
from fastmllm.data.cache import atomic_path
from fastmllm.data.progress import track
from fastmllm.data.shard_reader import Located
from fastmllm.data.shard_scan import is_image
from fastmllm.data.shards import ShardSource

MANIFEST = "reshard.json"
Line = tuple[str, str, Mapping[str, Any] | None]  # shard, key, record


@dataclass(frozen=True, kw_only=True, slots=True)
class Resharded:
    """What stands in the new shards.

    Args:
        shards: their files. samples: in them.
        missing: lines of the list that the source lost, or whose parts cannot be read; `missing.jsonl` says why.
    """

    shards: tuple[Path, ...]
    samples: int
    missing: int


def reshard(source: ShardSource, kept: Path, folder: Path, *, samples_per_shard: int = 5000) -> Resharded:
    """Copy kept samples, parts byte for byte, in the order of the list; a line's `record` takes the place of its texts.

    Shard n is `00000n.tar`, with lines n * samples_per_shard ... of the list; `00000n.origin.jsonl` says where each of
    its samples came from. Keys are numbers in the list; a JSON record's images become members beside it. An interrupted
    run goes on behind the last whole shard.

    Args:
        source: what the list was made from.
        kept: a list that `decide` wrote.
        folder: of the new shards.
        samples_per_shard: at most.

    Raises:
        ValueError: an empty or damaged list, or a folder that holds shards of another list.
        OSError: no space.
    """
    if samples_per_shard < 1:
        raise ValueError(f"reshard: samples_per_shard must be at least 1, got {samples_per_shard}")
    total = _begin(kept, folder, samples_per_shard)
    places = _Places(source)
    shards, samples = [], 0
    lines = _lines(kept)
    for number in track(range(-(-total // samples_per_shard)), "writing shards"):
        shard, origin = folder / f"{number:06}.tar", folder / f"{number:06}.origin.jsonl"
        rows = list(islice(lines, samples_per_shard))
        if not (shard.is_file() and origin.is_file()):  # the tar is renamed first: with both it is whole
            _write(shard, origin, rows, number * samples_per_shard, places)
        shards.append(shard)
        samples += sum(not json.loads(line).get("problem") for line in origin.read_text(encoding="utf-8").splitlines())
    _list_missing(folder, shards)
    return Resharded(shards=tuple(shards), samples=samples, missing=total - samples)


def _lines(kept: Path) -> Iterator[Line]:
    with kept.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                yield row["shard"], row["key"], row.get("record")
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f'{kept}: line {number} is no {{"shard": ..., "key": ...}}; make it again') from error


def _begin(kept: Path, folder: Path, each: int) -> int:
    """Return the lines of a list; note which one the folder is of."""
    digest, total = hashlib.sha256(), 0
    for row in _lines(kept):
        digest.update(repr(row).encode())
        total += 1
    if not total:
        raise ValueError(f"{kept}: empty; nothing was kept, so there is nothing to write")
    manifest = {"list": digest.hexdigest(), "samples_per_shard": each, "lines": total}
    path = folder / MANIFEST
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != manifest:
            raise ValueError(f"{folder}: holds shards of another list or size; give another folder, or remove it")
    elif folder.is_dir() and any(folder.glob("*.tar")):
        raise ValueError(f"{folder}: holds shards that are not of this list; give another folder")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(manifest), encoding="utf-8")
    return total


class _Places:
    """Find samples by name. A list follows its source, so that one shard's keys are held at a time."""

    def __init__(self, source: ShardSource) -> None:
        self.source = source
        self._numbers = {str(shard): number for number, shard in enumerate(source.shards)}
        self._shard, self._keys = "", {}  # type: ignore[var-annotated]

    def __getitem__(self, name: tuple[str, str]) -> tuple[str, Located]:
        shard, key = name
        number = self._numbers[shard]
        if shard != self._shard:
            size = self.source.sizes[number]
            keys = [self.source.located(number, i).key for i in range(size)]
            self._shard, self._keys = shard, {key: i for i, key in reversed(list(enumerate(keys)))}  # the first counts
        return shard, self.source.located(number, self._keys[key])


def _write(shard: Path, origin: Path, rows: list[Line], first: int, places: _Places) -> None:
    lines = []
    with atomic_path(shard) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, row in enumerate(rows, first):
            line = {"key": f"{number:09}", "shard": row[0], "from": row[1]}
            try:
                parts = list(_parts(*places[row[:2]], row[2]))
            except KeyError:
                lines.append(line | {"problem": "the source has no such sample any more"})
                continue
            except OSError as error:
                lines.append(line | {"problem": str(error)})
                continue
            for field, data in parts:
                info = tarfile.TarInfo(f"{number:09}.{field}")  # owner 0, time 0, mode 644: the same on every machine
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            lines.append(line)
    with atomic_path(origin) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _parts(shard: str, located: Located, record: Mapping[str, Any] | None) -> Iterator[tuple[str, bytes]]:
    """Yield (field, bytes) of a sample's parts; images are numbered where there are several."""
    images = sum(is_image(part.field) for part in located.parts)
    place = 0
    if record is not None:
        yield "json", json.dumps(record, ensure_ascii=False).encode()
    for part in located.parts:
        if record is not None and not is_image(part.field):
            continue
        path = part.path and Path(shard) / part.path
        data = path.read_bytes() if path else ByteRange(shard, part.offset, part.size).read()
        if not is_image(part.field):
            yield part.field, data
            continue
        suffix = (path.suffix.lstrip(".") if path else part.field.rpartition(".")[2]).lower()
        suffix = suffix if is_image(suffix) and re.fullmatch(r"\w+", suffix) else "jpg"  # Pillow looks at the bytes
        yield (f"{place}.{suffix}" if images > 1 else suffix), data
        place += 1


def _list_missing(folder: Path, shards: list[Path]) -> None:
    lines = [
        line
        for shard in shards
        for line in shard.with_suffix(".origin.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        if "problem" in json.loads(line)
    ]
    if lines:
        with atomic_path(folder / "missing.jsonl") as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
