"""Pairs of scenes that differ in one thing: what is said of it is true of the one and false of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastmllm.data.augment import rng_of
from fastmllm.data.canvas import Canvas, Habits
from fastmllm.data.images import open_image
from fastmllm.data.scenes import NUMBERS, Placed, Scene
from fastmllm.data.tasks import Subject

VERSION = 1  # raise it when a pair's making changes
COLOURS = ("red", "yellow", "green", "blue")
# Groups whose drawings have an up and a down; a wrench or a butterfly has none that a picture shows.
UPRIGHT = frozenset({"animal", "bird", "building", "plant", "flower", "drink", "furniture"})
TURNED = 0.05  # least mean difference, of 1, between a drawing and itself upside down


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """Two scenes and the two values of what differs: the first value is the first scene's.

    Args:
        kind: what differs: a key of `KINDS`.
        index: which pair of its kind.
        scenes: alike but for one thing.
        about: what questions name, the asked thing first; of existence the two things themselves.
        values: colours, numbers, "upright" and "upside down", "larger" and "smaller", or relations; () = existence.
    """

    kind: str
    index: int
    scenes: tuple[Scene, Scene]
    about: tuple[Subject, ...]
    values: tuple[str, ...] = ()


Made = tuple[Sequence[Placed], Sequence[Placed], tuple[Subject, ...], tuple[str, ...]]


def _existence(canvas: Canvas, choose: Callable[[Canvas, list[Subject], list[Subject]], list[Subject]]) -> Made:
    context = canvas.draw_from(canvas.pool, 2)
    first, second = choose(canvas, context, [s for s in canvas.pool if s not in context])
    cells = canvas.cells(3)
    around = [canvas.place(s, cell) for s, cell in zip(context, cells[1:], strict=True)]
    placed = canvas.place(first, cells[0])
    return [placed, *around], [replace(placed, subject=second), *around], (first, second), ()


def _random(canvas: Canvas, context: list[Subject], rest: list[Subject]) -> list[Subject]:
    return canvas.draw_from(rest, 2)


def _popular(canvas: Canvas, context: list[Subject], rest: list[Subject]) -> list[Subject]:
    rest = sorted(rest, key=lambda s: (-canvas.habits.seen[s.names["en"]], s.concept))
    return canvas.draw_from(rest[: max(2, len(rest) // 4)], 2)


def _adversarial(canvas: Canvas, context: list[Subject], rest: list[Subject]) -> list[Subject]:
    near = [s.names["en"] for s in context]

    def nearest(left: list[Subject]) -> list[Subject]:
        return sorted(left, key=lambda s: (-canvas.habits.company(s.names["en"], near), s.concept))

    first = canvas.draw_from(nearest(rest)[: max(1, len(rest) // 4)], 1)[0]
    near.append(first.names["en"])
    second = nearest([s for s in rest if s is not first])[0]
    return [first, second] if canvas.generator.random() < 0.5 else [second, first]


def _two(canvas: Canvas, pool: Sequence[Subject]) -> tuple[Subject, list[Placed]]:
    asked, other = canvas.draw_from(pool, 2)
    return asked, [canvas.place(s, cell) for s, cell in zip((asked, other), canvas.cells(2), strict=True)]


def _colour(canvas: Canvas) -> Made:
    asked, (a, b) = _two(canvas, canvas.pool)
    one, two = (COLOURS[i] for i in canvas.generator.choice(len(COLOURS), size=2, replace=False))
    return (
        [replace(a, card=one), replace(b, card=two)], [replace(a, card=two), replace(b, card=one)], (asked,), (one, two)
    )  # fmt: skip


def _size(canvas: Canvas) -> Made:
    asked, other = canvas.draw_from(canvas.pool, 2)
    (here, there), large, small = canvas.cells(2), (0.85, 0.95), (0.4, 0.5)
    return (
        [canvas.place(asked, here, large), canvas.place(other, there, small)],
        [canvas.place(asked, here, small), canvas.place(other, there, large)], (asked, other), ("larger", "smaller"),
    )  # fmt: skip


def _number(canvas: Canvas) -> Made:
    asked, other = canvas.draw_from(canvas.pool, 2)
    one, two = (int(n) for n in canvas.generator.choice([2, 3, 4], size=2, replace=False))
    # Four drawings in both scenes: their number alone says nothing.
    places = [canvas.place(other, cell) for cell in canvas.cells(4)]
    shown = [[replace(p, subject=asked) if i < count else p for i, p in enumerate(places)] for count in (one, two)]
    return shown[0], shown[1], (asked,), (NUMBERS[one - 1], NUMBERS[two - 1])


def _state(canvas: Canvas) -> Made:
    asked, (a, b) = _two(canvas, canvas.upright)
    values = ("upright", "upside down")
    return [a, replace(b, upside_down=True)], [replace(a, upside_down=True), b], (asked,), values


def _relation(canvas: Canvas, sideways: bool) -> Made:
    asked, other = canvas.draw_from(canvas.pool, 2)
    across = int(canvas.generator.integers(canvas.grid))
    low, high = sorted(int(i) for i in canvas.generator.choice(canvas.grid, size=2, replace=False))
    cells = [(across, low), (across, high)] if sideways else [(low, across), (high, across)]
    a, b = (canvas.place(s, cell) for s, cell in zip((asked, other), cells, strict=True))
    values = ("left of", "right of") if sideways else ("above", "below")
    return [a, b], [replace(a, subject=other), replace(b, subject=asked)], (asked, other), values


KINDS: dict[str, Callable[[Canvas], Made]] = {
    "existence, random": lambda canvas: _existence(canvas, _random),
    "existence, popular": lambda canvas: _existence(canvas, _popular),
    "existence, adversarial": lambda canvas: _existence(canvas, _adversarial),
    "attribute, colour": _colour,
    "attribute, size": _size,
    "attribute, number": _number,
    "attribute, state": _state,
    "relation, sideways": lambda canvas: _relation(canvas, sideways=True),
    "relation, upright": lambda canvas: _relation(canvas, sideways=False),
}


def standing(pool: Sequence[Subject]) -> list[Subject]:
    """Return the drawings that visibly have an up and a down."""
    found = []
    for subject in pool:
        if subject.group in UPRIGHT:
            image = open_image(subject.path, alpha=True).resize((32, 32))
            pixels = np.asarray(image, float)[..., :3] * (np.asarray(image, float)[..., 3:] / 255)
            if np.abs(pixels - pixels[::-1, ::-1]).mean() / 255 > TURNED:
                found.append(subject)
    return found


def contrasts(
    pool: Sequence[Subject], *, num: int, seed: int, habits: Habits, grid: int = 2, size: int = 224
) -> tuple[list[Contrast], list[str]]:
    """Make `num` pairs of each kind; a pure function of its arguments.

    Args:
        pool: drawings to choose from; at least four concepts, one drawing of each is used.
        num: pairs a kind.
        seed: which ones.
        habits: of training: popular things were seen often, adversarial ones together with what stands around them.
        grid, size: as `scenes.lay_out`.

    Returns:
        The pairs, and a note for each kind that cannot be made of this pool.

    Raises:
        ValueError: fewer than four concepts.
    """
    single = list({subject.concept: subject for subject in pool}.values())
    if len(single) < 4:
        raise ValueError(f"contrasts: at least 4 concepts are needed, got {len(single)}; raise data.scene_concepts")
    missing = {}
    if not habits.together:
        missing = dict.fromkeys(
            ("existence, popular", "existence, adversarial"), "data.train_scenes show none together"
        )
    upright = standing(single)
    if len(upright) < 2:
        missing["attribute, state"] = "fewer than two drawings have an up and a down"
    made = []
    for kind in (kind for kind in KINDS if kind not in missing):
        for index in range(num):
            canvas = Canvas(single, upright, habits, grid, size, rng_of("contrast", VERSION, kind, seed, index))
            first, second, about, values = KINDS[kind](canvas)
            scenes = (canvas.scene(first), canvas.scene(second))
            made.append(Contrast(kind=kind, index=index, scenes=scenes, about=about, values=values))
    return made, [f"no questions about {kind}: {why}" for kind, why in missing.items()]
