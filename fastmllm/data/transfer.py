"""Which skill helps which: train one for some steps, test all; and the order to teach them in that follows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fastmllm.data.cache import atomic_path

EXACT = 14  # skills up to which all orders are compared


@dataclass(frozen=True, slots=True)
class TransferMatrix:
    """What training one skill does to each.

    Args:
        skills: names.
        before: score of each skill at the start, higher is better.
        after: after[i][j] is skill j's score once skill i alone was trained from that start.
    """

    skills: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[tuple[float, ...], ...]

    def gain(self) -> np.ndarray:
        """Return (n, n): what skill j wins by training skill i, in units of what j wins by its own training.

        A skill that its own training does not improve counts in units of the mean gain.
        """
        raw = np.array(self.after) - np.array(self.before)
        own = np.diagonal(raw).copy()
        usual = own[own > 0].mean() if (own > 0).any() else 1.0
        return raw / np.where(own > 0, own, usual)

    def order(self) -> tuple[str, ...]:
        """Return the skills so that what helps others comes before them.

        Of all orders the one with the largest sum of gains from earlier to later skills (the linear ordering problem:
        exact up to `EXACT` skills, by best insertion beyond); skills that nothing tells apart stay as they were given.
        """
        gain = self.gain()
        chosen = _exact(gain) if len(self.skills) <= EXACT else _inserted(gain)
        return tuple(self.skills[i] for i in chosen)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(asdict(self) | {"order": self.order()}, indent=1), encoding="utf-8")


def measure_transfer(
    skills: Sequence[str], train: Callable[[str], None], test: Callable[[str], float], restore: Callable[[], None]
) -> TransferMatrix:
    """Train each skill alone from one start, and test all after each.

    Args:
        skills: names, at least two.
        train: trains a skill for the agreed number of steps.
        test: score of a skill, higher is better.
        restore: puts the start back; called before each training, and at the end.

    Raises:
        ValueError: fewer than two skills, or a score that is no number.
    """
    if len(skills) < 2 or len(set(skills)) < len(skills):
        raise ValueError(f"transfer: skills {list(skills)}: give two or more different ones")
    before, after = [test(skill) for skill in skills], []
    for skill in skills:
        restore()
        train(skill)
        after.append(tuple(test(other) for other in skills))
    restore()
    if not np.isfinite([before, *after]).all():
        raise ValueError(f"transfer: a score of {list(skills)} is no number: before {before}, after {after}")
    return TransferMatrix(tuple(skills), tuple(before), tuple(after))


def _exact(gain: np.ndarray) -> list[int]:
    """Compare all orders by sets: what comes first does not matter to what it adds before the rest."""
    n = len(gain)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(n):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for done, (total, order) in best.items():
            for i in range(n):
                if not done >> i & 1:
                    value = round(total + float(sum(gain[k, i] for k in order)), 12)
                    known = longer.get(done | 1 << i)
                    if known is None or value > known[0]:
                        longer[done | 1 << i] = (value, (*order, i))
        best = longer
    return list(best[(1 << n) - 1][1])


def _inserted(gain: np.ndarray) -> list[int]:
    order: list[int] = []
    for i in range(len(gain)):
        values = [gain[order[:at], i].sum() + gain[i, order[at:]].sum() for at in range(len(order) + 1)]
        order.insert(int(np.argmax(values)), i)
    return order
