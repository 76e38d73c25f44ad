"""The index of a shard: where each sample lies, made once, kept beside the cache, read row by row."""

from __future__ import annotations

import errno
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

from fastmllm.data.cache import atomic_path
from fastmllm.data.conversation import RecordError
from fastmllm.data.progress import track
from fastmllm.data.shard_reader import Located, ShardReader
from fastmllm.data.shard_scan import Part, scan

FORMAT = 2  # of the index files
_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE shard (stamp TEXT, samples INTEGER);
CREATE TABLE sample (number INTEGER PRIMARY KEY, key TEXT, parts TEXT, sizes TEXT);
CREATE TABLE skipped (key TEXT, reason TEXT, detail TEXT, file TEXT);
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A sample that is left out, for the log.

    Args:
        shard: file or folder.
        key: of the sample; "" = the shard itself.
        reason: one of a few, for counting.
        detail: what is wrong in this one.
    """

    shard: str
    key: str
    reason: str
    detail: str


class ShardIndex:
    """An index file, opened.

    Args:
        path: of the file.
        shard: that it is of.
        stamp: what the file must say of the shard; anything else counts as no index.

    Raises:
        LookupError: no index there, damaged, or of a shard that changed.
    """

    def __init__(self, path: Path, stamp: str) -> None:
        try:
            # Immutable: no lock files, so that it works on read-only and network disks. Threads take turns in SQLite.
            self._rows = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
            found, self.num_samples = self._rows.execute("SELECT stamp, samples FROM shard").fetchone()
        except (sqlite3.Error, TypeError) as error:
            raise LookupError(f"{path}: {error}") from error
        if found != stamp:
            self.close()
            raise LookupError(f"{path}: of {found}")

    def __getitem__(self, number: int) -> Located:
        row = self._rows.execute("SELECT key, parts, sizes FROM sample WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise IndexError(f"sample {number} of {self.num_samples}")
        parts, sizes = json.loads(row[1]), json.loads(row[2])
        return Located(key=row[0], parts=tuple(Part(*p) for p in parts), sizes=tuple((w, h) for w, h in sizes))

    def skipped(self, shard: str) -> Iterator[Skipped]:
        """List what was left out while indexing."""
        for key, reason, detail in self._rows.execute("SELECT key, reason, detail FROM skipped ORDER BY rowid"):
            yield Skipped(shard=shard, key=key, reason=reason, detail=detail)

    def mended(self, path: Path) -> bool:
        """Tell whether a file that was missing or damaged has been put there since."""
        made = path.stat().st_mtime_ns
        for (name,) in self._rows.execute("SELECT file FROM skipped WHERE file != ''"):
            try:
                if Path(name).stat().st_ctime_ns > made:  # of a file moved here too
                    return True
            except OSError:
                continue
        return False

    def close(self) -> None:
        self._rows.close()


def open_index(shard: Path, reader: ShardReader, cache: Path) -> ShardIndex:
    """Open the index of a shard; make it first where there is none, or the shard changed.

    Ranks may do so at once: each writes a file of its own, and the last one's stays, with the same rows.

    Args:
        shard: file or folder.
        reader: checks every sample.
        cache: asset folder.

    Raises:
        ValueError: a shard of no known kind.
        OSError: no such shard, or no space for the index.
    """
    name = hashlib.sha256(f"{shard.resolve()}|{reader.root.resolve()}".encode()).hexdigest()[:16]
    path = (cache / "shards" / f"{shard.name}-{name}.sqlite").resolve()
    stamp = stamp_of(shard)
    try:
        index = ShardIndex(path, stamp)
    except LookupError:
        pass
    else:
        if not index.mended(path):
            return index
        index.close()
    _build(path, stamp, shard, reader)
    return ShardIndex(path, stamp)


def stamp_of(shard: Path) -> str:
    """Return a text that changes when a shard's bytes may have: size and time, of a folder those of all its files."""
    stat = shard.stat()
    if not shard.is_dir():
        return f"{FORMAT}|{stat.st_size}|{stat.st_mtime_ns}"
    digest = hashlib.sha256()
    for file in sorted(shard.rglob("*")):
        stat = file.stat(follow_symlinks=False)
        digest.update(
            f"{file.relative_to(shard)!s}|{stat.st_size}|{stat.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return f"{FORMAT}|{digest.hexdigest()}"


def _build(path: Path, stamp: str, shard: Path, reader: ShardReader) -> None:
    with atomic_path(path) as temporary:
        try:
            with closing(sqlite3.connect(temporary)) as rows:
                rows.executescript(_TABLES)
                number = 0
                for entry in track(scan(shard), f"indexing {shard.name}"):
                    key = entry.key.encode(errors="backslashreplace").decode()
                    try:
                        if entry.problem is not None:
                            raise RecordError(*entry.problem)
                        found = reader.locate(shard, entry)
                    except RecordError as error:
                        row = (key, error.reason, error.detail, error.file)
                        rows.execute("INSERT INTO skipped VALUES (?, ?, ?, ?)", row)
                        continue
                    parts = json.dumps([astuple(part) for part in found.parts])
                    rows.execute(
                        "INSERT INTO sample VALUES (?, ?, ?, ?)", (number, key, parts, json.dumps(found.sizes))
                    )
                    number += 1
                rows.execute("INSERT INTO shard VALUES (?, ?)", (stamp, number))
                rows.commit()
        except sqlite3.OperationalError as error:
            full = "full" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, f"{path}: {error}") from error
