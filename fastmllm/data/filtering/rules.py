"""Thresholds of a coarse filter, and what one sample says to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fastmllm.data.filtering.language import language_of
from fastmllm.data.filtering.measure import Measured
from fastmllm.data.filtering.text_print import words_of

Same = Literal["sample", "image", "text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig:
    """What is kept. The defaults drop only what is damaged or stands there twice.

    Args:
        min_side: pixels, of the shorter side of every image (DataComp's basic filter: 200).
        max_pixels: of an image; 0 = `fastmllm.data.images.MAX_PIXELS`, beyond which nothing is decoded.
        max_aspect: longer side / shorter side (DataComp: 3); 0 = any.
        languages: codes that `language_of` returns, of the answers; empty = any.
        min_words, max_words: of the answers together; a Han character counts as one; max 0 = any.
        min_chars: of the answers together (DataComp: more than 2 words and 5 characters).
        need_image: text without an image is dropped.
        exact: drop what equals an earlier sample in all of it, in its images (decoded pixels), or in its text.
        near: drop what looks or reads almost like an earlier one; "sample": both.
        near_bits: of the 64 of a perceptual hash that may differ.
        near_colour: largest difference of mean colours on a 4 x 4 grid, 0-255.
        near_text: Jaccard similarity of word triples from which texts are near duplicates.
        min_score: of the image-text score, in the scale that its scorer says (ours: raw cosine, -1..1).
        top_fraction: share of what passed everything else that is kept, best scores first; 1 = all.
    """

    min_side: int = 1
    max_pixels: int = 0
    max_aspect: float = 0.0
    languages: tuple[str, ...] = ()
    min_words: int = 0
    max_words: int = 0
    min_chars: int = 0
    need_image: bool = False
    exact: tuple[Same, ...] = ("sample",)
    near: tuple[Same, ...] = ()
    near_bits: int = 6
    near_colour: int = 24
    near_text: float = 0.8
    min_score: float | None = None
    top_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.top_fraction <= 1.0:
            raise ValueError(f"filter: top_fraction must be in (0, 1], got {self.top_fraction}; 1 keeps all")
        if not 0.5 <= self.near_text <= 1.0:
            raise ValueError(f"filter: near_text must be in [0.5, 1], got {self.near_text}; MinHash misses less")
        if not 0 <= self.near_bits <= 15:
            raise ValueError(f"filter: near_bits must be 0 to 15 of 64, got {self.near_bits}: more is another picture")
        if self.max_words and self.max_words < self.min_words:
            raise ValueError(f"filter: max_words ({self.max_words}) is below min_words ({self.min_words})")
        if 0.0 < self.max_aspect < 1.0:
            raise ValueError(f"filter: max_aspect is longer / shorter side, at least 1, got {self.max_aspect}")

    @property
    def scored(self) -> bool:
        """Whether a score is needed."""
        return self.min_score is not None or self.top_fraction < 1.0


def faults(sample: Measured, config: FilterConfig) -> Iterator[tuple[str, str]]:
    """List what speaks against a sample by itself, cheapest first: (reason, detail)."""
    if sample.problem:
        yield sample.problem
        return
    if config.need_image and not sample.sizes:
        yield "no image", "text only"
    for width, height in sample.sizes:
        if min(width, height) < config.min_side:
            yield "image too small", f"{width} x {height} pixels, shorter side below {config.min_side}"
        if config.max_pixels and width * height > config.max_pixels:
            yield "image too large", f"{width} x {height} pixels, above {config.max_pixels}"
        if config.max_aspect and max(width, height) > config.max_aspect * min(width, height):
            yield "aspect ratio", f"{width} x {height} pixels, ratio above {config.max_aspect:g}"
    count = len(words_of(sample.answer))
    if count < config.min_words or len(sample.answer) < config.min_chars:
        yield "text too short", f"{count} words, {len(sample.answer)} characters"
    if config.max_words and count > config.max_words:
        yield "text too long", f"{count} words, above {config.max_words}"
    if config.languages and (found := sample.language or language_of(sample.answer)) not in config.languages:
        yield "language", f"{found or 'no letters'}, not {', '.join(config.languages)}"
    if config.scored and sample.sizes:
        if sample.score is None:
            yield "no score", "thresholds need one: measure with a scorer"
        elif config.min_score is not None and sample.score < config.min_score:
            yield "image-text score", f"{sample.score:.4f}, below {config.min_score:g}"
