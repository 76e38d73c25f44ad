"""Samples whose answers a model finds far less likely than others, or than without their images."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAD = 1.4826  # a normal distribution's standard deviation / its median absolute deviation
Losses = Mapping[tuple[str, str], tuple[float, float | None]]  # (shard, key) -> nats a token with image, and without


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanConfig:
    """What is suspicious.

    Args:
        answer_words: answers of at most so many words are compared; two captions of one image are no contradiction.
        near_bits, near_colour: as `FilterConfig`, within which two images are taken for one; 0 bits: equal pixels only.
        deviations: robust standard deviations above the median from which a loss is an outlier.
        group: samples with one question that are needed to compare them among each other, not with all.
        worse: nats a token by which an answer may be less likely with its image than without, where both are known.
    """

    answer_words: int = 5
    near_bits: int = 6
    near_colour: int = 24
    deviations: float = 4.0
    group: int = 30
    worse: float = 0.5

    def __post_init__(self) -> None:
        if self.answer_words < 1 or self.group < 3 or not self.deviations > 0:
            raise ValueError(
                f"clean: answer_words ({self.answer_words}), group ({self.group}, 3 or more) and deviations"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A sample that somebody should look at.

    Args:
        reason: one of a few, for counting. shard, key: of the sample. detail: what is wrong.
        others: keys that it disagrees with, some of them.
    """

    reason: str
    shard: str
    key: str
    detail: str
    others: tuple[str, ...] = ()


def read_losses(path: Path) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Read {shard, key, loss, blind} a line; blind, the loss without the image, may be left out.

    Raises:
        ValueError: a line that is none.
    """
    found = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                blind = row.get("blind")
                found[row["shard"], row["key"]] = float(row["loss"]), None if blind is None else float(blind)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}: line {number} is no {{shard, key, loss}}: {error}") from error
    return found


def outliers(rows: sqlite3.Connection, losses: Losses, config: CleanConfig) -> Iterator[Finding]:
    """Yield samples whose answers are far less likely than others, or than without their image."""
    if not losses:
        return
    known = []
    for shard, key, question, shown in rows.execute("SELECT shard, key, question, shown FROM sample ORDER BY number"):
        if (loss := losses.get((shard, key))) is None:
            continue
        if not np.isfinite(loss[0]):
            yield Finding(reason="loss outlier", shard=shard, key=key, detail=f"loss {loss[0]}: {shown!r}")
            continue
        if loss[1] is not None and loss[0] > loss[1] + config.worse:
            detail = f"{loss[0]:.3f} nats a token with the image, {loss[1]:.3f} without: {shown!r}"
            yield Finding(reason="image does not fit", shard=shard, key=key, detail=detail)
        known.append((shard, key, question, shown, loss[0]))
    sizes = Counter(question for _, _, question, _, _ in known)
    groups: dict[str, list[int]] = {}
    for place, (_, _, question, _, _) in enumerate(known):
        groups.setdefault(question if sizes[question] >= config.group else "", []).append(place)
    for places in groups.values():
        values = np.array([known[place][4] for place in places])
        middle = float(np.median(values))
        spread = MAD * float(np.median(np.abs(values - middle))) or float(np.std(values))
        for place, value in zip(places, values, strict=True):
            if spread and (value - middle) / spread > config.deviations:
                shard, key, _, shown, _ = known[place]
                detail = f"{value:.3f} nats a token, median {middle:.3f} of {len(places)}: {shown!r}"
                yield Finding(reason="loss outlier", shard=shard, key=key, detail=detail)
