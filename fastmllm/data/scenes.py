"""Scenes of one to four drawings on a grid, with the exact layout as truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmllm.data.augment import rng_of
from fastmllm.data.images import open_image, save_png
from fastmllm.data.progress import track
from fastmllm.data.sample import Sample
from fastmllm.data.tasks import Subject, be, with_article

VERSION = 2  # raise it when the drawing of a scene changes
NUMBERS = ("one", "two", "three", "four")
LIST_PROMPT = "What things are in the image?"
CELLS: dict[int, tuple[tuple[str, ...], ...]] = {
    2: (("top left", "top right"), ("bottom left", "bottom right")),
    3: (
        ("top left", "top middle", "top right"),
        ("middle left", "center", "middle right"),
        ("bottom left", "bottom middle", "bottom right"),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A drawing in its cell.

    Args:
        subject: the drawing.
        row, column: cell, from the top left.
        box: left, top, right, bottom in pixels.
        card: colour of a card behind it that fills its cell; "" = none.
        upside_down: whether it is turned by 180 degrees.
    """

    subject: Subject
    row: int
    column: int
    box: tuple[int, int, int, int]
    card: str = ""
    upside_down: bool = False

    @property
    def name(self) -> str:
        return self.subject.names["en"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Drawings on a canvas, in reading order.

    Args:
        index: which scene of its split.
        grid: cells on a side.
        size: side of the canvas in pixels.
        objects: the drawings.
    """

    index: int
    grid: int
    size: int
    objects: tuple[Placed, ...]

    def truth(self) -> dict[str, Any]:
        """Return the layout as JSON-able data."""
        return {
            "grid": self.grid,
            "objects": [placed.name for placed in self.objects],
            "layout": [
                {
                    "name": placed.name,
                    "concept": placed.subject.concept,
                    "source": placed.subject.source,
                    "cell": CELLS[self.grid][placed.row][placed.column],
                    "box": list(placed.box),
                }
                for placed in self.objects
            ],
        }


def lay_out(pool: Sequence[Subject], *, index: int, split: str, seed: int, grid: int = 2, size: int = 224) -> Scene:
    """Decide what a scene shows and where; a pure function of its arguments.

    Scene `index` has 1 + index % 4 drawings. In every other run of four scenes the first drawing's concept is
    repeated a random number of times, so that "how many of X" is not always one.

    Args:
        pool: drawings to choose from; at least four concepts.
        index, split, seed: which scene.
        grid: cells on a side, 2 or 3.
        size: side of the canvas in pixels, at least 16 for each cell.

    Raises:
        ValueError: an unknown grid, a canvas too small, or fewer than four concepts.
    """
    if grid not in CELLS:
        raise ValueError(f"scenes: grid must be one of {sorted(CELLS)}, got {grid}")
    if size < 16 * grid:
        raise ValueError(f"scenes: {size} pixels are too few for {grid} x {grid} cells; give {16 * grid} or more")
    by_concept: dict[str, list[Subject]] = {}
    for subject in pool:
        by_concept.setdefault(subject.concept, []).append(subject)
    if len(by_concept) < len(NUMBERS):
        raise ValueError(f"scenes: at least {len(NUMBERS)} concepts are needed, got {len(by_concept)}")
    generator = rng_of("scene", VERSION, split, seed, index)
    count = 1 + index % len(NUMBERS)
    concepts = sorted(by_concept)
    chosen = [concepts[i] for i in generator.choice(len(concepts), size=count, replace=False)]
    if index // len(NUMBERS) % 2:
        copies = int(generator.integers(1, count + 1))
        chosen = [chosen[0]] * copies + chosen[copies:]
    cells = sorted(int(cell) for cell in generator.choice(grid * grid, size=count, replace=False))
    generator.shuffle(chosen)
    side = size // grid
    objects = []
    for concept, cell in zip(chosen, cells, strict=True):
        drawings = by_concept[concept]
        subject = drawings[int(generator.integers(len(drawings)))]
        row, column = divmod(cell, grid)
        box = box_in(row, column, side, generator)
        objects.append(Placed(subject=subject, row=row, column=column, box=box))
    return Scene(index=index, grid=grid, size=size, objects=tuple(objects))


def box_in(
    row: int, column: int, side: int, generator: np.random.Generator, shares: tuple[float, float] = (0.75, 0.95)
) -> tuple[int, int, int, int]:
    """Return a square within a cell of `side` pixels: as large as one of the `shares` of it, anywhere in it."""
    drawn = round(side * generator.uniform(*shares))
    left = column * side + int(generator.integers(0, side - drawn + 1))
    top = row * side + int(generator.integers(0, side - drawn + 1))
    return (left, top, left + drawn, top + drawn)


def draw(scene: Scene) -> Image.Image:
    """Return the scene's picture, RGB on white."""
    canvas = Image.new("RGB", (scene.size, scene.size), "white")
    side = scene.size // scene.grid
    for placed in scene.objects:
        left, top, right, bottom = placed.box
        if placed.card:
            corner = (placed.column * side, placed.row * side)
            canvas.paste(placed.card, (*corner, corner[0] + side, corner[1] + side))
        drawing = open_image(placed.subject.path, alpha=True)
        if placed.upside_down:
            drawing = drawing.transpose(Image.Transpose.ROTATE_180)
        small = drawing.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        canvas.paste(small, (left, top), mask=small)
    return canvas


def scene_samples(scene: Scene, path: Path, *, split: str, seed: int) -> list[Sample]:
    """Ask about a scene: how many, where, left or above, and what is in it.

    count asks for all drawings and, where one is repeated, for that one too. position and relation only ask for
    things that appear once. Relations are true in every other run of eight scenes: balanced, and independent of how
    many drawings there are.

    Args:
        scene: the layout.
        path: its picture.
        split, seed: part of the ids, and of the choice of the axis.
    """
    generator = rng_of("ask", VERSION, split, seed, scene.index)
    teams = "+".join(sorted({placed.subject.source for placed in scene.objects}))
    truth = scene.truth()

    def sample(task: str, prompt: str, answer: str, kind: str, choices: tuple[str, ...], **more: Any) -> Sample:
        return Sample(
            id=f"{split}/{task}/en/scene-{scene.index}/{kind}",
            prompt=prompt,
            answer=answer,
            task=task,
            image=str(path),
            source=teams,
            choices=choices,
            references=(answer,) if task == "scene" else (),
            truth=truth | {"kind": kind} | more,
        )

    names = [placed.name for placed in scene.objects]
    once = [placed for placed in scene.objects if names.count(placed.name) == 1]
    made = [sample("count", "How many drawings are there?", NUMBERS[len(names) - 1], "all", NUMBERS)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    counted = repeated or ([names[0]] if scene.index // len(NUMBERS) % 2 and len(names) > 1 else [])
    for name in counted:
        answer = NUMBERS[names.count(name) - 1]
        made.append(
            sample("count", f"How many drawings of {with_article(name)} are there?", answer, "of", NUMBERS, asked=name)
        )
    cells = tuple(cell for row in CELLS[scene.grid] for cell in row)
    for placed in once:
        where = CELLS[scene.grid][placed.row][placed.column]
        made.append(
            sample(
                "position", f"Where {be(placed.name)} the {placed.name}?", where, placed.name, cells, asked=placed.name
            )
        )
    if len(once) > 1:
        made += _relation(once, scene.index // (2 * len(NUMBERS)) % 2 == 0, int(generator.integers(2)), sample)
    if len(once) == len(names):
        made.append(sample("scene", LIST_PROMPT, listed(names), "list", ()))
    return made


def listed(names: Sequence[str]) -> str:
    """Return English names as a list in words: "an owl, a bus and grapes"."""
    phrases = [with_article(name) for name in names]
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _relation(once: Sequence[Placed], truth: bool, axis: int, sample: Callable[..., Sample]) -> list[Sample]:
    # Two things that differ in their column (or, if none do, in their row).
    pairs = [(a, b) for i, a in enumerate(once) for b in once[i + 1 :]]
    sideways = [(a, b) for a, b in pairs if a.column != b.column]
    upright = [(a, b) for a, b in pairs if a.row != b.row]
    horizontal = bool(sideways) and (axis == 0 or not upright)
    first, second = (sideways if horizontal else upright)[0]
    ordered = first.column < second.column if horizontal else first.row < second.row
    if ordered != truth:
        first, second = second, first
    words = "left of" if horizontal else "above"
    prompt = f"{be(first.name).capitalize()} the {first.name} {words} the {second.name}?"
    answer = "yes" if truth else "no"
    return [sample("relation", prompt, answer, words, ("yes", "no"), asked=[first.name, second.name])]


def scenes(
    pool: Sequence[Subject], *, num: int, split: str, seed: int, folder: Path, key: str, grid: int = 2, size: int = 224
) -> list[tuple[Scene, Path]]:
    """Lay out `num` scenes and draw those that are not in the cache.

    Args:
        pool: drawings to choose from.
        num: how many scenes.
        split, seed: which ones.
        folder: where the pictures go.
        key: names the pool in the files' names, so that a path always means the same pixels.
        grid, size: as `lay_out`.
    """
    made = []
    for index in track(range(num), f"drawing {split} scenes", num):
        scene = lay_out(pool, index=index, split=split, seed=seed, grid=grid, size=size)
        path = folder / f"{split}-{key}-{index:05d}.png"
        if not path.exists():
            save_png(draw(scene), path)
        made.append((scene, path))
    return made
