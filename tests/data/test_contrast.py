"""Pairs differ in what they say they differ in, and in nothing else; adversarial things are those seen together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastmllm.data.canvas import Habits, habits_of
from fastmllm.data.contrast import KINDS, Contrast, contrasts, standing
from fastmllm.data.sample import Sample
from fastmllm.data.scenes import NUMBERS, draw
from fastmllm.data.tasks import Subject

NAMES = ("ant", "bus", "cat", "drum", "eggs", "fox", "goat", "hat")


def habits() -> Habits:
    # "hat" and "goat" are everywhere, and always together
    pictures = [("goat", "hat", name) for name in NAMES[:6]] + [("ant", "hat", "goat")]
    return habits_of(
        Sample(id=str(i), prompt="?", answer="x", task="count", image=str(i), truth={"objects": list(names)})
        for i, names in enumerate(pictures)
    )


def made(pool: list[Subject], num: int = 6, **changes) -> list[Contrast]:
    return contrasts(pool, num=num, seed=0, habits=habits(), size=64, **changes)[0]


def names_of(scene) -> list[str]:
    return [placed.name for placed in scene.objects]


def by_kind(pairs: list[Contrast], kind: str) -> list[Contrast]:
    return [pair for pair in pairs if pair.kind == kind]


def test_a_set_is_pure_and_has_every_kind(standing_pool: list[Subject]) -> None:
    pairs = made(standing_pool)
    assert pairs == made(standing_pool)
    assert pairs != contrasts(standing_pool, num=6, seed=1, habits=habits(), size=64)[0]
    assert {kind: len(by_kind(pairs, kind)) for kind in KINDS} == dict.fromkeys(KINDS, 6)


@pytest.mark.parametrize("grid", [2, 3])
def test_values_are_true_of_the_layouts(standing_pool: list[Subject], grid: int) -> None:
    for pair in made(standing_pool, grid=grid):
        asked = pair.about[0].names["en"]
        one, two = pair.scenes
        both = [
            {p.name: p for p in scene.objects}[asked] if asked in names_of(scene) else None for scene in pair.scenes
        ]
        if not pair.values:
            a, b = (subject.names["en"] for subject in pair.about)
            assert [a in names_of(s) for s in pair.scenes] == [True, False]
            assert [b in names_of(s) for s in pair.scenes] == [False, True]
            assert [p.box for p in one.objects] == [p.box for p in two.objects]
        elif pair.kind.endswith("colour"):
            assert tuple(p.card for p in both) == pair.values
            assert sorted(p.card for p in one.objects) == sorted(p.card for p in two.objects)  # only who has which
        elif pair.kind.endswith("number"):
            assert tuple(NUMBERS[names_of(s).count(asked) - 1] for s in pair.scenes) == pair.values
            assert len(one.objects) == len(two.objects) == 4
        elif pair.kind.endswith("state"):
            assert [p.upside_down for p in both] == [False, True]
            assert [sum(p.upside_down for p in s.objects) for s in pair.scenes] == [1, 1]
        else:
            other = pair.about[1].names["en"]
            for scene, value in zip(pair.scenes, pair.values, strict=True):
                where = {p.name: p for p in scene.objects}
                mine, theirs = where[asked], where[other]
                width = [p.box[2] - p.box[0] for p in (mine, theirs)]
                assert {
                    "larger": width[0] > 1.5 * width[1], "smaller": 1.5 * width[0] < width[1],
                    "left of": mine.box[2] <= theirs.box[0], "right of": mine.box[0] >= theirs.box[2],
                    "above": mine.box[3] <= theirs.box[1], "below": mine.box[1] >= theirs.box[3],
                }[value]  # fmt: skip


def test_popular_and_adversarial_things_are_those_of_training(standing_pool: list[Subject]) -> None:
    pairs = made(standing_pool, num=20)
    popular = by_kind(pairs, "existence, popular")
    assert any({"goat", "hat"} == {s.names["en"] for s in pair.about} for pair in popular)
    known = habits()
    for pair in by_kind(pairs, "existence, adversarial"):
        first, second = (s.names["en"] for s in pair.about)
        around = [n for n in names_of(pair.scenes[0]) if n != first]

        def nearest(name: str, other: str, around: list[str] = around) -> bool:
            beside = [*around, other]
            best = max(known.company(n, beside) for n in NAMES if n not in beside)
            return known.company(name, beside) == best

        assert nearest(first, second) or nearest(second, first)


def test_cards_and_turned_drawings_are_drawn(standing_pool: list[Subject]) -> None:
    pairs = made(standing_pool)
    pair = by_kind(pairs, "attribute, colour")[0]
    for scene, value in zip(pair.scenes, pair.values, strict=True):
        mine = next(p for p in scene.objects if p.name == pair.about[0].names["en"])
        corner = np.asarray(draw(scene))[mine.row * 32, mine.column * 32]
        colours = {"red": (255, 0, 0), "yellow": (255, 255, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}
        assert tuple(corner) == colours[value]
    turned = by_kind(pairs, "attribute, state")[0].scenes[0]
    pictures = [
        np.asarray(draw(replace(turned, objects=tuple(replace(p, upside_down=flag) for p in turned.objects))))
        for flag in (False, True)
    ]
    left, top, right, bottom = turned.objects[0].box
    upright, down = (p[top:bottom, left:right].astype(int) for p in pictures)
    assert np.abs(upright - down[::-1, ::-1]).mean() < 2 < np.abs(upright - down).mean()


def test_what_cannot_be_made_is_noted(standing_pool: list[Subject]) -> None:
    assert "bus" not in [s.names["en"] for s in standing(standing_pool)]  # of no group with an up and a down
    few = [replace(s, group="tool") for s in standing_pool]
    pairs, notes = contrasts(few, num=1, seed=0, habits=Habits(), size=64)
    assert len(pairs) == len(KINDS) - 3
    assert sorted(n.split(":")[0] for n in notes) == [
        f"no questions about {k}" for k in ("attribute, state", "existence, adversarial", "existence, popular")
    ]
    with pytest.raises(ValueError, match="at least 4 concepts"):
        contrasts(standing_pool[:3], num=1, seed=0, habits=Habits())
