"""A range of a file's bytes under a name of its own: a member of a tar is read without the tar."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"range://(\d+)\+(\d+)::(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Some bytes of a file.

    Args:
        path: the file.
        offset: of the first byte.
        size: in bytes.
    """

    path: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"range://{self.offset}+{self.size}::{self.path}"

    @classmethod
    def parse(cls, name: str | Path) -> ByteRange | None:
        """Return the range that `str` of it names; None for a plain path."""
        found = _NAME.fullmatch(name) if isinstance(name, str) else None
        return None if found is None else cls(found[3], int(found[1]), int(found[2]))

    def read(self, most: int | None = None) -> bytes:
        """Read the bytes, or the first `most` of them, with one seek.

        Raises:
            OSError: no such file, or it ends before the range does.
        """
        size = self.size if most is None else min(most, self.size)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            data = bytearray()
            while len(data) < size and (more := file.read(size - len(data))):
                data += more
        if len(data) < size:
            raise OSError(f"{self.path} ends {size - len(data)} bytes too early; fetch it again")
        return bytes(data)


def openable(name: str | Path) -> str | Path | io.BytesIO:
    """Return what Pillow opens: a path as it is, a range as a file in memory."""
    found = ByteRange.parse(name)
    return name if found is None else io.BytesIO(found.read())
