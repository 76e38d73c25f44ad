"""Read a verdict out of generated text. What cannot be read is `None`: counted as wrong, and reported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from fastmllm.data.text import normalise

_NEGATIONS = {"no", "not", "none", "without", "isn't", "aren't", "doesn't", "don't", "cannot", "can't"}


def parse_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the choice that the text is, or the only one that it contains as whole words; None if unclear."""
    answer = normalise(text)
    by_text = {normalise(c): c for c in choices}
    if answer in by_text:
        return by_text[answer]
    found = {c for key, c in by_text.items() if key and re.search(rf"(?<!\w){re.escape(key)}(?!\w)", answer)}
    # "green apple" contains "apple": the longest mention wins when it covers the others
    longest = max(found, key=len, default=None)
    return longest if longest is not None and all(normalise(f) in normalise(longest) for f in found) else None


def parse_yes_no(text: str) -> Literal["yes", "no"] | None:
    """Read yes or no from the first word, else from an unmistakable negation; None if unclear.

    "There is not a dog." is no, "There isn't any dog." is no, "Yes, and there is no cat." is yes, a refusal is None.
    """
    words = re.findall(r"[\w']+", text.casefold().replace("’", "'"))
    if not words:
        return None
    if words[0] in ("yes", "no"):
        return "yes" if words[0] == "yes" else "no"
    if words[0] in ("there", "it", "this", "that", "the") and _NEGATIONS & set(words):
        return "no"
    return None
