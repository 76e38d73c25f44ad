"""What contrasting scenes are made with: cells, drawings, and what training showed how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from fastmllm.data.sample import Sample
from fastmllm.data.scenes import Placed, Scene, box_in
from fastmllm.data.tasks import Subject


@dataclass(frozen=True, slots=True)
class Habits:
    """What a model saw in training: how often each thing was there, and how often two things together.

    Args:
        seen: name -> pictures.
        together: (name, name), in alphabetical order -> pictures.
    """

    seen: Counter[str] = field(default_factory=Counter)
    together: Counter[tuple[str, str]] = field(default_factory=Counter)

    def company(self, name: str, others: Iterable[str]) -> int:
        """Count the pictures that a thing shared with each of some others."""
        return sum(self.together[min(name, other), max(name, other)] for other in others)


def habits_of(samples: Iterable[Sample]) -> Habits:
    """Count the objects of the samples' truth, a picture once."""
    pictures = {s.image: sorted(set(s.truth["objects"])) for s in samples if s.image and "objects" in s.truth}
    found = Habits()
    for names in pictures.values():
        found.seen.update(names)
        found.together.update(combinations(names, 2))
    return found


class Canvas:
    """What one pair is drawn from and with.

    Args:
        pool: one drawing a concept.
        upright: those that visibly have an up and a down.
        habits: of training.
        grid, size: as `scenes.lay_out`.
        generator: decides everything.
    """

    def __init__(
        self, pool: Sequence[Subject], upright: Sequence[Subject], habits: Habits, grid: int, size: int,
        generator: np.random.Generator,
    ) -> None:  # fmt: skip
        self.pool, self.upright, self.habits, self.generator = list(pool), list(upright), habits, generator
        self.grid, self.size = grid, size

    def draw_from(self, pool: Sequence[Subject], num: int) -> list[Subject]:
        return [pool[i] for i in self.generator.choice(len(pool), size=num, replace=False)]

    def cells(self, num: int) -> list[tuple[int, int]]:
        chosen = self.generator.choice(self.grid**2, size=num, replace=False)
        return [divmod(int(cell), self.grid) for cell in chosen]

    def place(self, subject: Subject, cell: tuple[int, int], shares: tuple[float, float] = (0.75, 0.95)) -> Placed:
        return Placed(
            subject=subject, row=cell[0], column=cell[1],
            box=box_in(*cell, self.size // self.grid, self.generator, shares),
        )  # fmt: skip

    def scene(self, objects: Iterable[Placed]) -> Scene:
        """Return the scene in reading order."""
        ordered = tuple(sorted(objects, key=lambda placed: (placed.row, placed.column)))
        return Scene(index=0, grid=self.grid, size=self.size, objects=ordered)
