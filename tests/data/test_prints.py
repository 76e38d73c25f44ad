"""Near duplicates found through bands are those that comparing everything with everything finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmllm.data.filtering import image_print, text_print
from fastmllm.data.filtering.image_print import ImagePrint, looks_like
from fastmllm.data.filtering.language import language_of
from fastmllm.data.filtering.measure import Measured
from fastmllm.data.filtering.rules import FilterConfig
from fastmllm.data.filtering.seen import Seen
from fastmllm.data.filtering.text_print import jaccard, shingles


def prints_near(generator: np.random.Generator, count: int) -> list[ImagePrint]:
    """Centres, and copies of them with a few bits and a little colour changed."""
    found = []
    for i in range(count):
        if i % 3 == 0 or not found:
            shape, colours = int(generator.integers(1 << 63)), generator.integers(0, 256, 48)
        else:
            near = found[int(generator.integers(len(found)))]
            flips = generator.choice(64, int(generator.integers(0, 12)), replace=False)
            shape = near.shape ^ sum(1 << int(bit) for bit in flips)
            colours = np.clip(np.array(near.colours) + generator.integers(-20, 21, 48), 0, 255)
        found.append(ImagePrint(f"{i}", shape, tuple(int(c) for c in colours)))
    return found


@pytest.mark.parametrize("bits", [0, 3, 6, 15])
def test_image_bands_find_what_brute_force_finds(tmp_path: Path, bits: int) -> None:
    config = FilterConfig(exact=(), near=("image",), near_bits=bits)
    seen, kept, expected, got = Seen(tmp_path / "s", config), [], [], []
    for i, print_ in enumerate(prints_near(np.random.default_rng(bits), 120)):
        sample = Measured(shard="s", key=str(i), prints=(print_,), sizes=((9, 9),))
        expected.append(next((k for k, p in kept if looks_like(p, print_, bits=bits, colour=24)), None))
        found = seen.repeated(sample)
        got.append(found and found[1].key)
        if found is None:
            seen.add(sample)
            kept.append((sample.key, print_))
    seen.close()
    assert got == expected
    assert bits == 0 or sum(key is not None for key in got) > 10


def test_text_bands_find_what_brute_force_finds(tmp_path: Path) -> None:
    generator, words = np.random.default_rng(3), [f"w{i}" for i in range(400)]
    texts = [" ".join(generator.choice(words, 30)) for _ in range(40)]
    for base in list(texts):
        changed = base.split()
        for place in generator.choice(30, int(generator.integers(1, 5)), replace=False):
            changed[place] = "other"
        texts.append(" ".join(changed))
    seen, kept, expected, got = Seen(tmp_path / "s", FilterConfig(exact=(), near=("text",), near_text=0.8)), [], [], []
    for i, text in enumerate(texts):
        grams = shingles(text)
        expected.append(any(jaccard(grams, other) >= 0.8 for other in kept))
        sample = Measured(shard="s", key=str(i), answer=text)
        got.append(seen.repeated(sample) is not None)
        if not got[-1]:
            seen.add(sample)
            kept.append(grams)
    seen.close()
    assert got == expected  # at 0.8 one of 2,500 is missed
    assert 5 < sum(got) < 40


@settings(max_examples=25, deadline=None)
@given(st.integers(0, (1 << 64) - 1), st.sets(st.integers(0, 63), max_size=6))
def test_prints_within_the_distance_share_a_band(shape: int, flips: set[int]) -> None:
    other = shape ^ sum(1 << bit for bit in flips)
    cut = image_print.bands(shape, 6)
    assert any(a == b for a, b in zip(cut, image_print.bands(other, 6), strict=True))
    widths = [64 * (i + 1) // 7 - 64 * i // 7 for i in range(7)]
    assert sum(band << sum(widths[:i]) for i, band in enumerate(cut)) == shape


def test_a_print_ignores_scale_and_format_but_not_colour() -> None:
    coarse = np.random.default_rng(1).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)
    base, small = (image_print.image_print(image) for image in (picture, picture.resize((60, 50))))
    assert looks_like(base, small, bits=6, colour=24)
    assert base.pixels != small.pixels
    assert base.pixels == image_print.image_print(picture.copy()).pixels
    red, blue = (image_print.image_print(Image.new("RGB", (20, 20), c)) for c in ((200, 0, 0), (0, 0, 255)))
    assert red.shape == blue.shape == 0  # no structure, so no noise for one either
    assert not looks_like(red, blue, bits=64, colour=24)


def test_minhash_estimates_jaccard() -> None:
    a, b = (frozenset(f"g{i}" for i in range(start, start + 100)) for start in (0, 10))
    shared = [x == y for x, y in zip(text_print.bands(a), text_print.bands(b), strict=True)]
    assert jaccard(a, b) == pytest.approx(90 / 110)
    assert 2 <= sum(shared) <= 14  # 20 bands, each equal with probability 0.82^5 = 0.37
    assert text_print.bands(a) == text_print.bands(frozenset(sorted(a, reverse=True)))
    assert text_print.bands(frozenset()) == []


@pytest.mark.parametrize(
    "text, code",
    [
        ("a red apple", "en"), ("apple", "en"), ("ein Hund und eine Katze", "latin"), ("garçon à l'école", "latin"),
        ("een hond in de tuin met een bal", "latin"), ("一只红苹果", "zh"), ("一只猫, iPhone 15", "zh"),
        ("赤いリンゴ", "ja"), ("빨간 사과", "ko"), ("красное яблоко", "other"), ("12 34!", ""), ("", ""),
    ],
)  # fmt: skip
def test_languages_by_script(text: str, code: str) -> None:
    assert language_of(text) == code
