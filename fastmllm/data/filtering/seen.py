"""Samples that a new one may repeat, on disk: memory stays the same however many there are."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from fastmllm.data.filtering import image_print, text_print
from fastmllm.data.filtering.image_print import looks_like
from fastmllm.data.filtering.measure import Measured
from fastmllm.data.filtering.rules import FilterConfig
from fastmllm.data.filtering.text_print import jaccard, shingles

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE sample (number INTEGER PRIMARY KEY, measured TEXT);
CREATE TABLE mark (kind TEXT, value TEXT, number INTEGER, PRIMARY KEY (kind, value, number)) WITHOUT ROWID;
"""


class Seen:
    """What was kept so far, found again by equal or similar content.

    Exact duplicates share a mark. Near duplicates share one of several: of images surely (pigeonhole over the bits of
    their first image), of texts with the probability of `text_print.BANDS`; each candidate is then compared itself.

    Args:
        path: file to hold it; what is there is begun anew.
        config: what counts as the same.
    """

    def __init__(self, path: Path, config: FilterConfig) -> None:
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows, self.config = sqlite3.connect(path), config
        self._rows.executescript(_TABLES)
        self._count = 0

    def close(self) -> None:
        """Close the file."""
        self._rows.close()

    def repeated(self, sample: Measured) -> tuple[str, Measured] | None:
        """Return how a sample repeats an earlier one, and which; None where it does not."""
        if found := self._first("key", [f"{sample.shard}|{sample.key}"]):
            return "duplicate id", found
        for what in self.config.exact:
            if (mark := self._exact(sample, what)) and (found := self._first(f"exact {what}", [mark])):
                return f"exact duplicate ({what})", found
        if self.config.near:
            for other in self._candidates("look", self._look(sample)):
                if how := self._near(sample, other, by_image=True):
                    return f"near duplicate ({how})", other
            for other in self._candidates("read", self._read(sample)):
                if how := self._near(sample, other, by_image=False):
                    return f"near duplicate ({how})", other
        return None

    def add(self, sample: Measured) -> None:
        """Remember a sample that is kept."""
        self._count += 1
        self._rows.execute("INSERT INTO sample VALUES (?, ?)", (self._count, json.dumps(asdict(sample))))
        marks = [("key", f"{sample.shard}|{sample.key}")]
        marks += [(f"exact {what}", mark) for what in self.config.exact if (mark := self._exact(sample, what))]
        if self.config.near:
            marks += [("look", mark) for mark in self._look(sample)] + [("read", mark) for mark in self._read(sample)]
        rows = [(kind, value, self._count) for kind, value in marks]
        self._rows.executemany("INSERT OR IGNORE INTO mark VALUES (?, ?, ?)", rows)

    def _first(self, kind: str, values: Iterable[str]) -> Measured | None:
        return next(self._candidates(kind, values), None)

    def _candidates(self, kind: str, values: Iterable[str]) -> Iterator[Measured]:
        numbers: set[int] = set()
        for value in values:
            rows = self._rows.execute("SELECT number FROM mark WHERE kind = ? AND value = ?", (kind, value))
            numbers.update(number for (number,) in rows)
        for number in sorted(numbers):
            (text,) = self._rows.execute("SELECT measured FROM sample WHERE number = ?", (number,)).fetchone()
            yield Measured.from_line(text)

    def _exact(self, sample: Measured, what: str) -> str:
        """Return what equals only in equal samples; "" where a sample has none of it."""
        pixels = "/".join(print.pixels for print in sample.prints)
        text = " ".join(f"{sample.question}\n{sample.answer}".split()).casefold()
        return {"image": pixels, "text": text, "sample": f"{pixels}\n{text}"}[what]

    def _look(self, sample: Measured) -> list[str]:
        if not sample.prints or not {"image", "sample"} & set(self.config.near):
            return []
        cut = image_print.bands(sample.prints[0].shape, self.config.near_bits)
        return [f"{len(sample.prints)}/{i}/{band}" for i, band in enumerate(cut)]

    def _read(self, sample: Measured) -> list[str]:
        # a sample without images is near another by its text alone
        if "text" not in self.config.near and (sample.prints or "sample" not in self.config.near):
            return []
        return [f"{i}/{band}" for i, band in enumerate(text_print.bands(_words(sample)))]

    def _near(self, a: Measured, b: Measured, *, by_image: bool) -> str:
        config = self.config
        image = len(a.prints) == len(b.prints) > 0 and all(
            looks_like(x, y, bits=config.near_bits, colour=config.near_colour)
            for x, y in zip(a.prints, b.prints, strict=True)
        )
        if by_image and not image:
            return ""
        if "image" in config.near and image:
            return "image"
        text = jaccard(_words(a), _words(b)) >= config.near_text
        if "text" in config.near and text:
            return "text"
        alone = not a.prints and not b.prints
        return "sample" if "sample" in config.near and text and (image or alone) else ""


def _words(sample: Measured) -> frozenset[str]:
    return shingles(f"{sample.question}\n{sample.answer}")
