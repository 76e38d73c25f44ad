"""JSON records of any columns, read and written one by one; what cannot be used is listed beside them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmllm.data.byte_range import ByteRange
from fastmllm.data.cache import atomic_path
from fastmllm.data.conversation import RecordError, parse_json
from fastmllm.data.shard_index import Skipped
from fastmllm.data.shard_scan import scan


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A JSON object and where it stands.

    Args:
        key: number of its line or element; in a folder or tar its name.
        data: its columns.
    """

    key: str
    data: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Its own id, or the key."""
        named = next((self.data[name] for name in ("id", "question_id", "image_id") if name in self.data), self.key)
        return str(named)


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """How many records a file got, and reason -> how many were left out."""

    records: int
    skipped: Counter[str]


def read_records(path: Path) -> Iterator[Record | Skipped]:
    """Read the records of a .jsonl, .json (list), folder or tar; nothing but the present one is held.

    Raises:
        ValueError: a file of no known kind.
        OSError: no such file.
    """
    for entry in scan(path):
        text = next((part for part in entry.parts if part.field == "json"), None)
        try:
            if entry.problem is not None:
                raise RecordError(*entry.problem)
            if text is None:
                continue  # an image or a caption: no record
            named = ByteRange(str(path), text.offset, text.size)
            data = named.read() if text.offset >= 0 else (path / text.path).read_bytes()
            yield Record(key=entry.key, data=parse_json(data))
        except RecordError as error:
            yield Skipped(shard=str(path), key=entry.key, reason=error.reason, detail=error.detail)


def write_records(path: Path, items: Iterable[Mapping[str, Any] | Skipped]) -> Written:
    """Write records as JSONL, what was left out into `<name>.skipped.jsonl`; both whole or not at all.

    Raises:
        OSError: no space.
    """
    count, skipped = 0, Counter[str]()
    with ExitStack() as stack:
        names = (path, path.with_name(f"{path.name.removesuffix('.jsonl')}.skipped.jsonl"))
        files = [stack.enter_context(atomic_path(name)) for name in names]
        good, bad = (
            stack.enter_context(file.open("w", encoding="utf-8", errors="backslashreplace"))  # of a file's name
            for file in files
        )
        for item in items:
            if isinstance(item, Skipped):
                skipped[item.reason] += 1
                bad.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
            else:
                count += 1
                good.write(json.dumps(item, ensure_ascii=False) + "\n")
    return Written(records=count, skipped=skipped)
