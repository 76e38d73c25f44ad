"""Answers on disk: asked once, in blocks that do not depend on ranks or interruptions, and matched by id."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmllm.data.sample import Sample

BLOCK = 64


def _alone() -> None:
    """Wait for nobody."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which part of the questions this process asks.

    Args:
        rank, world: this process, and how many there are.
        barrier: returns when all ranks have called it.
    """

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = _alone


@dataclass(slots=True)
class AnswerLog:
    """Ask questions block by block and append each answer to a JSONL file, a file a task, condition and rank.

    A block is 64 questions in their order, whoever asks it: what is computed together depends neither on the number of
    ranks nor on where an earlier run was interrupted, and so neither do the answers.

    Args:
        folder: of the files, seen by all ranks; None = nothing is kept, and there is one rank.
        identity: of the model and its settings; answers of another one are not reused.
        ranks: see there.
        block: questions of a block.
        retry: ask again, with the rest of its block, what an earlier run could not.
        damaged: "file:line" of lines that could not be read, which are asked again.
        failures: questions that could not be asked, with the reason.

    Raises:
        ValueError: several ranks without a folder.
    """

    folder: Path | None = None
    identity: str = ""
    ranks: Ranks = Ranks()
    block: int = BLOCK
    retry: bool = False
    damaged: list[str] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.folder is None and self.ranks.world > 1:
            raise ValueError(
                "eval: several ranks share their answers through files: give a folder that all of them see"
            )

    def collect(
        self,
        task: str,
        condition: str,
        samples: Sequence[Sample],
        ask: Callable[[list[Sample]], Sequence[str | Exception]],
        how: str = "",
    ) -> list[str | None]:
        """Return an answer to each question, asking only what no file holds; None where it could not be asked.

        Args:
            task, condition: name the files.
            samples: ids must be unique.
            ask: questions -> answers, or the reason why there is none. A `ValueError` or `OSError` (an unreadable
                image, a text that cannot be tokenised) makes the block be asked one by one, and is listed.
            how: `ask` answers, in words; an answer got in another way is not reused.

        Raises:
            RuntimeError: another rank left a block unanswered.
        """
        blocks = [list(samples[i : i + self.block]) for i in range(0, len(samples), self.block)]
        keys = [self._key(how, block) for block in blocks]
        stem = f"{_file_name(task)}.{_file_name(condition)}"
        found = self._read(stem)
        for number, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            mine = number % self.ranks.world == self.ranks.rank
            if mine and not all(self._known(found.get((key, s.id))) for s in block):
                lines = [{"block": key, **line} for line in _asked(block, ask)]
                self._append(stem, lines)
                found.update({(key, line["id"]): line for line in lines})
        if self.ranks.world > 1:
            self.ranks.barrier()
            found = self._read(stem)
        answers: list[str | None] = []
        for key, block in zip(keys, blocks, strict=True):
            for sample in block:
                if (key, sample.id) not in found:
                    raise RuntimeError(f"{self.folder}: no rank answered {sample.id!r} of {task}; start the run again")
                line = found[key, sample.id]
                answers.append(line["said"])
                if line["said"] is None:
                    self.failures.append(
                        {"task": task, "condition": condition, "id": sample.id, "error": line["error"]}
                    )
        return answers

    def _known(self, line: dict[str, Any] | None) -> bool:
        return line is not None and not (self.retry and line["said"] is None)

    def _key(self, how: str, block: Sequence[Sample]) -> str:
        asked = [(s.id, s.prompt, s.image, _stamp(s.image), s.choices) for s in block]
        return hashlib.sha256(json.dumps([self.identity, how, asked]).encode()).hexdigest()[:16]

    def _read(self, stem: str) -> dict[tuple[str, str], dict[str, Any]]:
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{stem}.*.jsonl")) if self.folder is not None else ():
            with open(path, "rb") as file:
                for number, raw in enumerate(file, 1):
                    try:
                        line = json.loads(raw)
                        if not isinstance(line["said"], str):
                            line["error"] += ""  # a failure says why
                        found[line["block"], line["id"]] = line
                    except (ValueError, KeyError, TypeError):
                        if (place := f"{path}:{number}") not in self.damaged:
                            self.damaged.append(place)
        return found

    def _append(self, stem: str, lines: Sequence[dict[str, Any]]) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{stem}.{self.ranks.rank}.jsonl"
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with open(path, "a+b") as file:
            if file.tell() and not _ends_a_line(file):
                file.write(b"\n")  # behind the half line of a killed run
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def _asked(block: list[Sample], ask: Callable[[list[Sample]], Sequence[str | Exception]]) -> list[dict[str, Any]]:
    try:
        return [_line(sample, said) for sample, said in zip(block, ask(block), strict=True)]
    except (ValueError, OSError) as error:
        if len(block) == 1:
            return [_line(block[0], error)]
        return [line for sample in block for line in _asked([sample], ask)]


def _line(sample: Sample, said: str | Exception) -> dict[str, Any]:
    if isinstance(said, str):
        return {"id": sample.id, "said": said}
    return {"id": sample.id, "said": None, "error": f"{type(said).__name__}: {said}"}


def _stamp(image: str | None) -> list[int] | None:
    try:
        found = os.stat(image) if image is not None else None
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns] if found is not None else None


def _file_name(text: str) -> str:
    return re.sub(r"[^\w-]+", "_", text)


def _ends_a_line(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
