"""From measurements and thresholds to a list of kept samples, with a reason for every other one."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastmllm.data.cache import atomic_path
from fastmllm.data.filtering.measure import Measured
from fastmllm.data.filtering.rules import FilterConfig, faults
from fastmllm.data.filtering.seen import Seen

KEPT, DROPPED, SUMMARY = "kept.jsonl", "dropped.jsonl", "summary.json"
EXAMPLES = 8  # of a reason
BELOW = "below the top fraction"


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A dropped sample for the report.

    Args:
        images: what `open_image` reads. text: its words. detail: what was wrong.
        like: images of the sample that it repeats.
    """

    images: tuple[str, ...]
    text: str
    detail: str
    like: tuple[str, ...] = ()


@dataclass(slots=True)
class Filtered:
    """What a filter did; `summary.json` holds it.

    Args:
        config: thresholds. seen, kept: samples.
        dropped: reason -> samples that left for it; each sample leaves for its first reason.
        failing: reason -> samples that it speaks against, whatever else does; repetitions are only looked for among
            samples that nothing else speaks against.
        scores: number and deciles of the scores of what passed everything else; empty = none.
        cut: score of the last one in the top fraction; None = all were kept.
        examples: reason -> some of them, drawn by a hash of their names.
    """

    config: FilterConfig
    seen: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failing: Counter[str] = field(default_factory=Counter)
    scores: dict[str, Any] = field(default_factory=dict)
    cut: float | None = None
    examples: dict[str, list[Example]] = field(default_factory=dict)


def decide(samples: Iterable[Measured], config: FilterConfig, folder: Path) -> Filtered:
    """Choose samples and write `kept.jsonl`, `dropped.jsonl` and `summary.json`, each whole or not at all.

    Args:
        samples: in a fixed order: of samples that repeat each other the first stays.
        config: thresholds.
        folder: where the lists go; a line of `kept.jsonl` is {shard, key}, one of `dropped.jsonl` has a reason, too.

    Raises:
        ValueError: no samples, or no scores where the thresholds need them.
        OSError: no space.
    """
    out, drawn = Filtered(config), _Drawn()
    scores = array("d")  # of what nothing speaks against; nan without an image, which is not ranked
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".deciding-") as scratch:
        seen, verdicts = Seen(Path(scratch) / "seen.sqlite", config), Path(scratch) / "verdicts.jsonl"
        with closing(seen), verdicts.open("w", encoding="utf-8") as file:
            for sample in samples:
                out.seen += 1
                row = _verdict(sample, config, seen, out.failing)
                if not row["reason"]:
                    scores.append(math.nan if sample.score is None else sample.score)
                file.write(json.dumps(row) + "\n")
        if not out.seen:
            raise ValueError(f"{folder}: no samples to choose from; check the source's path")
        if out.failing["no score"] == out.seen:
            raise ValueError("filter: min_score and top_fraction need scores; measure with a scorer")
        _write(verdicts, _top(np.array(scores), config, out), folder, out, drawn)
    out.examples = drawn.examples()
    counts = {"dropped": dict(out.dropped), "failing": dict(out.failing)}  # asdict makes no Counter of a Counter
    with atomic_path(folder / SUMMARY) as temporary:
        temporary.write_text(json.dumps(asdict(out) | counts, indent=1), encoding="utf-8")
    return out


def _verdict(sample: Measured, config: FilterConfig, seen: Seen, failing: Counter[str]) -> dict[str, Any]:
    row = {"shard": sample.shard, "key": sample.key, "reason": "", "detail": "", "images": sample.images[:4]}
    row["text"] = f"{sample.question}\n{sample.answer}".strip()[:400]
    found = list(faults(sample, config))
    failing.update({reason for reason, _ in found})
    if found:
        return row | {"reason": found[0][0], "detail": found[0][1]}
    if (repeated := seen.repeated(sample)) is not None:
        reason, other = repeated
        failing[reason] += 1
        return row | {"reason": reason, "detail": f"of {other.shard}: {other.key}", "like": other.images[:4]}
    seen.add(sample)
    return row


class _Drawn:
    """The `EXAMPLES` of each reason whose names hash highest: the same whatever was dropped before."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[int, int, Example]]] = {}

    def add(self, number: int, row: dict[str, Any]) -> None:
        rank = int.from_bytes(hashlib.sha256(f"{row['shard']}|{row['key']}".encode()).digest()[:7], "big")
        images, like = tuple(row["images"]), tuple(row.get("like", ()))
        example = Example(images=images, text=row["text"], detail=row["detail"][:400], like=like)
        found = self._found.setdefault(row["reason"], [])
        heapq.heappush(found, (rank, number, example))
        if len(found) > EXAMPLES:
            heapq.heappop(found)

    def examples(self) -> dict[str, list[Example]]:
        return {reason: [example for _, _, example in sorted(found)] for reason, found in self._found.items()}


def _top(scores: np.ndarray, config: FilterConfig, out: Filtered) -> np.ndarray:
    """Return which of the samples stay, (n,) bool; of equal scores the earlier ones."""
    ranked = ~np.isnan(scores)
    if ranked.any():
        steps = np.quantile(scores[ranked], np.linspace(0, 1, 11))
        out.scores = {"count": int(ranked.sum()), "deciles": [round(float(value), 6) for value in steps]}
    stays = np.ones(len(scores), dtype=bool)
    if config.top_fraction < 1.0 and ranked.any():
        places = np.flatnonzero(ranked)
        order = places[np.argsort(-scores[places], kind="stable")]
        count = max(1, round(config.top_fraction * len(order)))
        out.cut = float(scores[order[count - 1]])
        stays[order[count:]] = False
    return stays


def _write(verdicts: Path, stays: np.ndarray, folder: Path, out: Filtered, drawn: _Drawn) -> None:
    passed: Iterator[bool] = iter(stays.tolist())
    with ExitStack() as stack:
        lines = stack.enter_context(verdicts.open(encoding="utf-8"))
        files = [stack.enter_context(atomic_path(folder / name)) for name in (KEPT, DROPPED)]
        kept, dropped = (stack.enter_context(file.open("w", encoding="utf-8")) for file in files)
        for number, line in enumerate(lines):
            row = json.loads(line)
            named = {"shard": row["shard"], "key": row["key"]}
            if not row["reason"] and next(passed):
                out.kept += 1
                kept.write(json.dumps(named) + "\n")
                continue
            if not row["reason"]:
                row |= {"reason": BELOW, "detail": f"score below {out.cut:.4f}, or equal and later"}
                out.failing[BELOW] += 1
            out.dropped[row["reason"]] += 1
            drawn.add(number, row)
            dropped.write(json.dumps(named | {"reason": row["reason"], "detail": row["detail"]}) + "\n")
