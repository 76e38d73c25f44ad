from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmllm.data.images import load_image
from fastmllm.data.sample import Sample
from fastmllm.data.scenes import CELLS, NUMBERS, draw, lay_out, scene_samples, scenes
from fastmllm.data.tasks import Subject

NAMES = ("ant", "bus", "cat", "drum", "eggs", "fox")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    folder = tmp_path_factory.mktemp("drawings")
    made = []
    for i, name in enumerate(NAMES):
        pixels = np.zeros((32, 32, 4), dtype=np.uint8)
        pixels[2:30, 2:30] = (40 * i, 255 - 40 * i, 20, 255)  # its own colour, on a transparent ground
        path = folder / f"{name}.png"
        Image.fromarray(pixels).save(path)
        made.append(Subject(key=name, path=str(path), concept=name, source="noto", group="x", names={"en": name}))
    return made


def ask_all(pool: list[Subject], num: int, grid: int = 2) -> list[Sample]:
    made = []
    for index in range(num):
        scene = lay_out(pool, index=index, split="train", seed=0, grid=grid)
        made += scene_samples(scene, Path(f"{index}.png"), split="train", seed=0)
    return made


def test_a_layout_is_pure_and_the_number_of_drawings_is_balanced(pool: list[Subject]) -> None:
    first = [lay_out(pool, index=i, split="eval", seed=5) for i in range(40)]
    assert first == [lay_out(pool, index=i, split="eval", seed=5) for i in range(40)]
    assert first != [lay_out(pool, index=i, split="train", seed=5) for i in range(40)]
    assert Counter(len(scene.objects) for scene in first) == {1: 10, 2: 10, 3: 10, 4: 10}


@pytest.mark.parametrize("grid", [2, 3])
def test_the_picture_shows_the_layout(pool: list[Subject], grid: int) -> None:
    for index in range(8):
        scene = lay_out(pool, index=index, split="train", seed=0, grid=grid, size=96)
        pixels = np.asarray(draw(scene)).astype(int)
        covered = np.zeros((96, 96), dtype=bool)
        side = 96 // grid
        for placed in scene.objects:
            left, top, right, bottom = placed.box
            assert placed.column * side <= left < right <= (placed.column + 1) * side
            assert placed.row * side <= top < bottom <= (placed.row + 1) * side
            i = NAMES.index(placed.name)
            middle = pixels[(top + bottom) // 2, (left + right) // 2]
            assert np.abs(middle - (40 * i, 255 - 40 * i, 20)).max() <= 2
            covered[top:bottom, left:right] = True
        assert (pixels[~covered] == 255).all()


@pytest.mark.parametrize("grid", [2, 3])
def test_answers_follow_from_the_layout(pool: list[Subject], grid: int) -> None:
    cells = [cell for row in CELLS[grid] for cell in row]
    for sample in ask_all(pool, 64, grid):
        layout = sample.truth["layout"]
        where = {entry["name"]: divmod(cells.index(entry["cell"]), grid) for entry in layout}
        names = [entry["name"] for entry in layout]
        if sample.task == "count":
            count = len(names) if sample.truth["kind"] == "all" else names.count(sample.truth["asked"])
            assert sample.answer == NUMBERS[count - 1]
        elif sample.task == "position":
            assert names.count(sample.truth["asked"]) == 1
            assert sample.answer == cells[where[sample.truth["asked"]][0] * grid + where[sample.truth["asked"]][1]]
        elif sample.task == "relation":
            a, b = (where[name] for name in sample.truth["asked"])
            true = a[1] < b[1] if sample.truth["kind"] == "left of" else a[0] < b[0]
            false = a[1] > b[1] if sample.truth["kind"] == "left of" else a[0] > b[0]
            assert (true, false) == (sample.answer == "yes", sample.answer == "no")
        else:
            assert sample.task == "scene"
            assert all(name in sample.answer for name in names)
        assert not sample.choices or sample.answer in sample.choices


def test_answers_are_balanced_and_ids_unique(pool: list[Subject]) -> None:
    samples = ask_all(pool, 160)
    assert len({sample.id for sample in samples}) == len(samples)
    relation = Counter(sample.answer for sample in samples if sample.task == "relation")
    assert abs(relation["yes"] - relation["no"]) <= 0.15 * relation.total()
    of_one = Counter(s.answer for s in samples if s.task == "count" and s.truth["kind"] == "of")
    assert len(of_one) == 4
    assert max(of_one.values()) < 0.6 * of_one.total()
    eggs = [s.prompt for s in samples if s.task == "position" and s.truth["asked"] == "eggs"]
    assert set(eggs) == {"Where are the eggs?"}


def test_scenes_are_drawn_once(pool: list[Subject], tmp_path: Path) -> None:
    made = scenes(pool, num=5, split="train", seed=0, folder=tmp_path, key="k", size=64)
    times = [path.stat().st_mtime_ns for _, path in made]
    again = scenes(pool, num=5, split="train", seed=0, folder=tmp_path, key="k", size=64)
    assert [path.stat().st_mtime_ns for _, path in again] == times
    assert load_image(made[0][1], None).shape == (64, 64, 3)


def test_bad_arguments(pool: list[Subject]) -> None:
    with pytest.raises(ValueError, match=r"grid must be one of \[2, 3\]"):
        lay_out(pool, index=0, split="train", seed=0, grid=4)
    with pytest.raises(ValueError, match="20 pixels are too few"):
        lay_out(pool, index=0, split="train", seed=0, size=20)
    with pytest.raises(ValueError, match="at least 4 concepts"):
        lay_out(pool[:3], index=0, split="train", seed=0)
