"""Measure every sample of a source once: sizes, text, fingerprints, image-text score, or why it is unusable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from fastmllm.data.cache import atomic_path
from fastmllm.data.conversation import PLACEHOLDER
from fastmllm.data.filtering.image_print import ImagePrint, image_print
from fastmllm.data.images import MAX_PIXELS, ImageError, open_image
from fastmllm.data.progress import track
from fastmllm.data.sample import Conversation
from fastmllm.data.shard_index import Skipped
from fastmllm.data.shard_reader import Located
from fastmllm.data.shards import ShardSource

VERSION = 1  # raise it when a measurement changes
CHUNK = 500  # samples of a file, which is written whole: what an interruption costs at most
Scorer = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # images, texts -> scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A sample as a filter sees it.

    Args:
        shard: file or folder. key: of the sample in it.
        question, answer: the words of all turns.
        sizes: (width, height) of each image in pixels.
        images: what `open_image` reads.
        prints: of the images.
        language: where an identifier was given; "" = by script.
        score: of the first image and the answer; None = not scored.
        problem: why it is unusable, (reason, detail).
    """

    shard: str
    key: str
    question: str = ""
    answer: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    images: tuple[str, ...] = ()
    prints: tuple[ImagePrint, ...] = ()
    language: str = ""
    score: float | None = None
    problem: tuple[str, str] | None = None

    @classmethod
    def from_line(cls, line: str) -> Measured:
        """Read what `json.dumps(asdict(...))` wrote."""
        raw = json.loads(line)
        raw["prints"] = tuple(ImagePrint(p["pixels"], p["shape"], tuple(p["colours"])) for p in raw["prints"])
        raw["sizes"] = tuple((w, h) for w, h in raw["sizes"])
        return cls(**raw | {"images": tuple(raw["images"]), "problem": tuple(raw["problem"] or ()) or None})


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """How samples are measured beyond what is always looked at.

    Args:
        scorer: (images, texts) -> scores of pairs, in a scale of its own; None = none. It takes at most `batch_size`.
        language: text -> code; None = by script, when a threshold asks.
        name: says which scorer and identifier, with their weights: measurements of another name are made anew.
        batch_size: pairs that are scored together.
        workers: threads that decode.
    """

    scorer: Scorer | None = None
    language: Callable[[str], str] | None = None
    name: str = ""
    batch_size: int = 32
    workers: int = min(8, os.cpu_count() or 1)

    def __post_init__(self) -> None:
        if (self.scorer or self.language) and not self.name:
            raise ValueError("measures: give a name for the scorer or identifier, so that stored ones are told apart")
        if self.batch_size < 1 or self.workers < 1:
            raise ValueError(f"measures: batch_size {self.batch_size} and workers {self.workers} must be at least 1")


def measure(source: ShardSource, folder: Path, measures: Measures | None = None) -> Iterator[Measured]:
    """Yield every sample of a source in the order of its shards, measured now or by an earlier run.

    Args:
        source: what to read.
        folder: keeps the measurements, `CHUNK` samples a file; an interrupted run goes on behind the last whole one.
        measures: what else is measured.

    Raises:
        OSError: no space for the measurements.
    """
    measures = measures or Measures()
    for number, shard in enumerate(source.shards):
        stamp = hashlib.sha256(f"{VERSION}|{measures.name}|{shard.resolve()}|{source.stamp(number)}".encode())
        for chunk in range(0, max(source.sizes[number], 1), CHUNK):
            file = folder / f"{number:06}-{chunk:09}-{stamp.hexdigest()[:12]}.jsonl"
            if not file.is_file():
                last = min(chunk + CHUNK, source.sizes[number])
                _measure_chunk(source, number, range(chunk, last), measures, file)
            with file.open(encoding="utf-8") as lines:
                yield from map(Measured.from_line, lines)
        for skipped in source.skipped_of(number):
            yield Measured(shard=skipped.shard, key=skipped.key, problem=(skipped.reason, skipped.detail))


def _measure_chunk(source: ShardSource, shard: int, numbers: range, measures: Measures, file: Path) -> None:
    where = str(source.shards[shard])
    look = partial(_look, where, measures)
    batches = range(0, len(numbers), measures.batch_size)
    starts = track(batches, f"measuring {where}", len(batches))
    with (
        atomic_path(file) as temporary,
        temporary.open("w", encoding="utf-8") as out,
        ThreadPoolExecutor(measures.workers) as pool,
    ):
        for start in starts:
            part = numbers[start : start + measures.batch_size]
            read = [(source.located(shard, n), source.sample(shard, n)) for n in part]
            for found in _score(list(pool.map(look, *zip(*read, strict=True))), measures):
                out.write(json.dumps(asdict(found)) + "\n")


def _look(shard: str, measures: Measures, at: Located, sample: Conversation | Skipped) -> Measured:
    found, sizes = Measured(shard=shard, key=at.key, sizes=at.sizes), at.sizes
    if isinstance(sample, Skipped):
        return replace(found, problem=(sample.reason, sample.detail))
    answer = "\n".join(turn.answer for turn in sample.turns)
    question = "\n".join(turn.prompt.replace(PLACEHOLDER, "").strip() for turn in sample.turns)
    found = replace(found, question=question, answer=answer, images=sample.images)
    if large := next((size for size in sizes if size[0] * size[1] > MAX_PIXELS), None):
        detail = f"{large[0]} x {large[1]} pixels, more than {MAX_PIXELS}"
        return replace(found, problem=("decompression bomb", detail))
    try:
        prints = tuple(image_print(open_image(name)) for name in sample.images)
    except ImageError as error:
        return replace(found, problem=("undecodable image", str(error)))
    return replace(found, prints=prints, language=measures.language(answer) if measures.language else "")


def _score(found: list[Measured], measures: Measures) -> list[Measured]:
    chosen = [i for i, sample in enumerate(found) if sample.prints and not sample.problem]
    if measures.scorer is None or not chosen:
        return found
    scores = measures.scorer([found[i].images[0] for i in chosen], [found[i].answer for i in chosen])
    if len(scores) != len(chosen):
        raise ValueError(f"scorer {measures.name}: {len(scores)} scores for {len(chosen)} pairs; return one for each")
    for i, score in zip(chosen, scores, strict=True):
        ok = float("-inf") < float(score) < float("inf")
        found[i] = replace(found[i], score=float(score)) if ok else replace(found[i], problem=("no score", str(score)))
    return found
