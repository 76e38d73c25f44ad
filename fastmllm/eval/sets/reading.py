"""Read the files of published sets: what is missing is said with its remedy, what is malformed is listed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fastmllm.data.sample import Sample
from fastmllm.eval.task import Task

LISTED = 100
WORD = "\nAnswer the question using a single word or phrase."  # LLaVA's and lmms-eval's


class SetError(ValueError):
    """A set that is not where it was said to be; the message says what to put where."""


class RowError(ValueError):
    """A row that cannot be asked; the message is one of a few reasons, for counting."""


@dataclass(slots=True)
class Loaded:
    """A set as tasks.

    Args:
        name: of the set.
        tasks: made of its questions.
        skipped: reason -> rows left out.
        listed: the first hundred of them, "file: row: reason".
        notes: what differs from the published set, such as its size.
    """

    name: str
    tasks: list[Task] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    listed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Reader:
    """One set's folder.

    Args:
        name: of the set.
        folder: where it lies.
        layout: what the folder must hold and where it comes from, for messages.
        images: whether a question whose image is not there is left out; without, for baselines of the words alone,
            images are names.

    Raises:
        SetError: there is no such folder.
    """

    def __init__(self, name: str, folder: str | Path, layout: str, images: bool = True) -> None:
        self.folder, self.layout, self.images = Path(folder), layout, images
        self.loaded = Loaded(name)
        self._ids: set[str] = set()
        if not self.folder.is_dir():
            raise SetError(f"{name}: {folder} is no folder; it must hold {layout}")

    def file(self, *names: str) -> Path:
        """Return the first of several files that is there.

        Raises:
            SetError: none is.
        """
        for name in names:
            if (path := self.folder / name).is_file():
                return path
        raise SetError(f"{self.loaded.name}: {self.folder} has no {' or '.join(names)}; it must hold {self.layout}")

    def json(self, path: Path, kind: type) -> Any:
        """Read a JSON file whose top is a `kind`.

        Raises:
            SetError: it is none.
        """
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise SetError(f"{self.loaded.name}: {path} is no JSON ({error}); fetch it again") from error
        if not isinstance(found, kind):
            raise SetError(f"{self.loaded.name}: {path} holds a {type(found).__name__}, not a {kind.__name__}")
        return found

    def lines(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yield (where, row) of a JSONL file; a line that is no JSON is a row that is none."""
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path.name}:{number}", json.loads(line)
                    except (ValueError, RecursionError):
                        self.drop(f"{path.name}:{number}", "no JSON")

    def samples(self, rows: Iterator[tuple[str, Any]], make: Callable[[Any], list[Sample] | Sample]) -> list[Sample]:
        """Make questions of rows; a row that `make` cannot read, or an id that was there before, is left out."""
        kept: list[Sample] = []
        for where, row in rows:
            try:
                made = make(row)
            except RowError as error:
                self.drop(where, str(error))
                continue
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                self.drop(where, f"malformed row ({type(error).__name__})")
                continue
            for sample in [made] if isinstance(made, Sample) else made:
                if sample.id in self._ids:
                    self.drop(where, "duplicate id")
                elif not sample.prompt.strip():
                    self.drop(where, "empty question")
                else:
                    self._ids.add(sample.id)
                    kept.append(sample)
        return kept

    def drop(self, where: str, reason: str) -> None:
        """Count a row that is left out, and list it."""
        self.loaded.skipped[reason] += 1
        if len(self.loaded.listed) < LISTED:
            self.loaded.listed.append(f"{where}: {reason}")

    def image(self, *places: str) -> str:
        """Return the path of an image, of the first place below the folder that has it.

        Raises:
            RowError: an absolute or parent path, or no such file.
        """
        for place in places:
            if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
                raise RowError("image outside of the folder")
            path = self.folder / place
            if not self.images or path.is_file():
                return str(path)
        raise RowError("image missing")

    def expect(self, what: str, found: int, published: int) -> None:
        """Note where a file is not of the published size."""
        if found != published:
            self.loaded.notes.append(f"{self.loaded.name}: {found} {what}, {published} are published")


def one_of(value: Any, known: Sequence[str], reason: str) -> str:
    """Return a value that must be one of a few.

    Raises:
        RowError: it is another.
    """
    if value not in known:
        raise RowError(reason)
    return value


def text_of(row: Mapping[str, Any], name: str) -> str:
    """Return a text of a row.

    Raises:
        RowError: something else stands there.
    """
    if not isinstance(value := row[name], str):
        raise RowError(f"{name} is no text")
    return value
