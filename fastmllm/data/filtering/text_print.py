"""Fingerprints of texts: MinHash bands that texts with many common word triples are likely to share."""

from __future__ import annotations

import hashlib
import re

import numpy as np

WORDS = 3  # in a shingle; captions are short (datatrove takes 5 for web pages)
BANDS, ROWS = 20, 5  # texts of Jaccard similarity s meet with probability 1 - (1 - s^5)^20: 0.9996 at 0.8, 0.47 at 0.5
_PRIME = np.uint64(4294967311)  # the first above 2^32
_rng = np.random.default_rng(1997)  # fixed: prints of different runs must agree
_A = _rng.integers(1, 1 << 31, BANDS * ROWS, dtype=np.uint64)
_B = _rng.integers(0, 1 << 31, BANDS * ROWS, dtype=np.uint64)


def words_of(text: str) -> list[str]:
    """Split into words in lower case without punctuation; Han characters and kana stand alone."""
    return re.findall(r"[㐀-鿿぀-ヿ]|[^\W㐀-鿿぀-ヿ]+", text.casefold())


def shingles(text: str) -> frozenset[str]:
    """Return the runs of `WORDS` words of a text; a shorter text is one shingle, one without words none."""
    words = words_of(text)
    if len(words) < WORDS:
        return frozenset({" ".join(words)} if words else ())
    return frozenset(" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return the share of shingles that two texts have in common; 1 where both have none."""
    return len(a & b) / len(a | b) if a or b else 1.0


def bands(grams: frozenset[str]) -> list[int]:
    """Return the `BANDS` hashes of a text's MinHash (Broder 1997), 60 bits each; nothing for a text without words."""
    if not grams:
        return []
    known = [int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=4).digest(), "big") for gram in sorted(grams)]
    x = np.array(known, dtype=np.uint64)
    least = ((_A[:, None] * x + _B[:, None]) % _PRIME).min(axis=1).reshape(BANDS, ROWS)  # (20, 5)
    return [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "big") >> 4 for row in least]
