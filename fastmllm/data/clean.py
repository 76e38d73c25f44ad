"""Find pairs that teach something wrong: corrupt, contradictory, or with answers that do not fit their images."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from fastmllm.data.cache import atomic_path
from fastmllm.data.filtering.measure import Measured
from fastmllm.data.filtering.rules import FilterConfig
from fastmllm.data.filtering.seen import Seen
from fastmllm.data.filtering.text_print import words_of
from fastmllm.data.loss_outliers import CleanConfig, Finding, Losses, outliers
from fastmllm.data.records import Record, read_records
from fastmllm.data.shard_index import Skipped
from fastmllm.data.text import normalise


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaned:
    """What was found: samples seen, samples without a finding, reason -> findings."""

    seen: int
    kept: int
    found: Counter[str]


def clean(
    samples: Iterable[Measured], folder: Path, losses: Losses | None = None, config: CleanConfig | None = None
) -> Cleaned:
    """Write `findings.jsonl`, and `kept.jsonl` of the samples without a finding, a list that `reshard` takes.

    Args:
        samples: as `filtering.measure` yields them.
        folder: of the lists.
        losses: (shard, key) -> nats a token of the answer with its image, and without or None (`read_losses`).
        config: see there.

    Raises:
        OSError: no space.
    """
    config, found, kept = config or CleanConfig(), Counter[str](), 0
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".cleaning-") as scratch,
        closing(sqlite3.connect(Path(scratch) / "samples.sqlite")) as rows,
        closing(Seen(Path(scratch) / "images.sqlite", _same_image(config))) as images,
    ):
        rows.execute("CREATE TABLE sample (number INTEGER PRIMARY KEY, shard, key, asked, question, answer, shown)")
        rows.execute("CREATE TABLE finding (shard, key, line)")
        seen = 0
        for sample in samples:
            seen += 1
            if sample.problem:
                finding = Finding(
                    reason=sample.problem[0], shard=sample.shard, key=sample.key, detail=sample.problem[1]
                )
                _put(rows, finding)
            else:
                rows.execute("INSERT INTO sample VALUES (?, ?, ?, ?, ?, ?, ?)", (seen, *_row(sample, config, images)))
        rows.execute("CREATE INDEX asked ON sample (asked)")
        shards = [Path(shard) for (shard,) in rows.execute("SELECT DISTINCT shard FROM sample ORDER BY shard")]
        for finding in chain(_contradictions(rows), outliers(rows, losses or {}, config), _doubled(shards)):
            _put(rows, finding)
        found.update(json.loads(line)["reason"] for (line,) in rows.execute("SELECT line FROM finding"))
        rows.execute("CREATE INDEX found ON finding (shard, key)")
        with atomic_path(folder / "findings.jsonl") as temporary, temporary.open("w", encoding="utf-8") as out:
            out.writelines(line + "\n" for (line,) in rows.execute("SELECT line FROM finding ORDER BY rowid"))
        good = rows.execute(
            "SELECT shard, key FROM sample WHERE NOT EXISTS (SELECT 1 FROM finding "
            "WHERE finding.shard = sample.shard AND finding.key = sample.key) ORDER BY number"
        )
        with atomic_path(folder / "kept.jsonl") as temporary, temporary.open("w", encoding="utf-8") as out:
            for shard, key in good:
                kept += 1
                out.write(json.dumps({"shard": shard, "key": key}) + "\n")
    return Cleaned(seen=seen, kept=kept, found=found)


def _put(rows: sqlite3.Connection, finding: Finding) -> None:
    rows.execute("INSERT INTO finding VALUES (?, ?, ?)", (finding.shard, finding.key, json.dumps(asdict(finding))))


def _same_image(config: CleanConfig) -> FilterConfig:
    near = ("image",) if config.near_bits else ()
    return FilterConfig(exact=("image",), near=near, near_bits=config.near_bits, near_colour=config.near_colour)  # type: ignore[arg-type]


def _row(sample: Measured, config: CleanConfig, seen: Seen) -> tuple[object, ...]:
    question, first = normalise(sample.question), sample
    if sample.prints:
        if (repeated := seen.repeated(sample)) is None:
            seen.add(sample)
        elif repeated[0] != "duplicate id":
            first = repeated[1]  # of the samples with this image
    images = "/".join(print.pixels for print in first.prints)
    short = len(words_of(sample.answer)) <= config.answer_words
    asked = hashlib.sha256(f"{images}\n{question}".encode()).hexdigest() if short else None
    kind = hashlib.sha256(question.encode()).hexdigest()[:16]
    return sample.shard, sample.key, asked, kind, normalise(sample.answer), sample.answer[:80]


def _contradictions(rows: sqlite3.Connection) -> Iterator[Finding]:
    """Yield samples that answer one question about one image in different ways."""
    groups = rows.execute(
        "SELECT asked FROM sample WHERE asked IS NOT NULL GROUP BY asked HAVING COUNT(DISTINCT answer) > 1 "
        "ORDER BY MIN(number)"
    ).fetchall()
    for (asked,) in groups:
        members = rows.execute(
            "SELECT shard, key, answer, shown FROM sample WHERE asked = ? ORDER BY number LIMIT 1000", (asked,)
        ).fetchall()
        votes = Counter(answer for _, _, answer, _ in members)
        said = ", ".join(f"{answer!r} x {count}" for answer, count in votes.most_common(5))
        for shard, key, answer, shown in members:
            others = tuple(k for _, k, other, _ in members if other != answer)[:5]
            yield Finding(
                reason="contradictory answers", shard=shard, key=key, detail=f"{shown!r}; all: {said}", others=others
            )


def _doubled(shards: Iterable[Path]) -> Iterator[Finding]:
    """Yield records of a JSON file that have the id of an earlier one and say something else."""
    for shard in shards:
        if shard.suffix.lower() not in (".json", ".jsonl", ".ndjson"):
            continue  # in tars and folders the key is the id
        first: dict[bytes, tuple[str, bytes]] = {}
        for record in read_records(shard):
            if isinstance(record, Skipped) or not any(name in record.data for name in ("id", "question_id")):
                continue
            content = _digest(record)
            earlier = first.setdefault(hashlib.sha256(record.id.encode()).digest()[:12], (record.key, content))
            if earlier[1] != content:
                detail = f"{record.id!r} is {earlier[0]}'s id, too"
                yield Finding(
                    reason="duplicate id", shard=str(shard), key=record.key, detail=detail, others=(earlier[0],)
                )


def _digest(record: Record) -> bytes:
    return hashlib.sha256(json.dumps(record.data, sort_keys=True).encode()).digest()[:12]
