from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmllm.data.augment import light, rng_of, transformed, variants


@pytest.fixture
def drawing(tmp_path: Path) -> Path:
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)
    pixels[4:28, 4:16] = (200, 90, 40, 255)
    Image.fromarray(pixels).save(tmp_path / "drawing.png")
    return tmp_path / "drawing.png"


def test_a_path_fixes_the_pixels(drawing: Path, tmp_path: Path) -> None:
    first = variants(drawing, name="x", folder=tmp_path / "a", num=3, seed=1)
    assert first[0] == drawing
    assert len({path.read_bytes() for path in first}) == 4
    times = [path.stat().st_mtime_ns for path in first]
    assert [
        path.stat().st_mtime_ns for path in variants(drawing, name="x", folder=tmp_path / "a", num=3, seed=1)
    ] == times
    other = variants(drawing, name="x", folder=tmp_path / "a", num=1, seed=2)
    assert other[1] not in first
    assert other[1].read_bytes() not in [path.read_bytes() for path in first]
    # Deleted and made again, it is the same file.
    before = first[2].read_bytes()
    first[2].unlink()
    variants(drawing, name="x", folder=tmp_path / "a", num=3, seed=1)
    assert first[2].read_bytes() == before


def test_the_ground_stays_transparent(drawing: Path) -> None:
    with Image.open(drawing) as image:
        for index in range(8):
            changed = np.asarray(light(image, rng_of("test", index)))
            assert changed.shape == (32, 32, 4)
            share = (changed[..., 3] > 128).mean() / ((24 * 12) / 32**2)
            assert 0.55 < share < 1.1  # between 0.8 and 1 of the side


def test_the_held_out_form_differs_from_every_light_one(drawing: Path, tmp_path: Path) -> None:
    held = transformed(drawing, name="x", folder=tmp_path / "h")
    with Image.open(held) as image:
        pixels = np.asarray(image)
    solid = pixels[pixels[..., 3] == 255]
    assert solid[:, 2].max() < 40 * 0.8 * 0.9  # darker in blue than brightness alone can make it
    assert pixels[16, 20:, 3].max() == 255  # mirrored to the right half
    assert held.read_bytes() == transformed(drawing, name="x", folder=tmp_path / "h2").read_bytes()


def test_random_numbers_do_not_depend_on_the_process() -> None:
    assert rng_of("a", 1).integers(1 << 30) == rng_of("a", 1).integers(1 << 30) == 26654381
    assert rng_of("a", 1).integers(1 << 30) != rng_of("a", 2).integers(1 << 30)
