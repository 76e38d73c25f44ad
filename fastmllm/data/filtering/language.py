"""The language of a caption by its script, English told from its neighbours by their commonest words.

This is coarse on purpose and needs nothing installed. Han characters without kana are Chinese; Latin letters are
English unless marks (é, ß) are many or the function words of German, French, Spanish, Italian, Portuguese or Dutch
outvote the English ones, so "Hund" alone passes as English. Where that matters give `Measures` an identifier such as
fastText's.
"""

from __future__ import annotations

import re
import unicodedata

_SCRIPTS = (
    ("ja", re.compile(r"[぀-ヿㇰ-ㇿ]")),  # before Han, which Japanese uses too
    ("ko", re.compile(r"[가-힯ᄀ-ᇿ]")),
    ("zh", re.compile(r"[㐀-鿿豈-﫿]")),
    ("latin", re.compile(r"[A-Za-zÀ-ɏ]")),
)
_ENGLISH = frozenset(
    re.split(r"\s+", "the a an of and in on with is are at to from for by its his her two three there this that it")
)
_NEIGHBOURS = frozenset(
    re.split(
        r"\s+",
        "der die das ein eine einer und ist mit auf im von le la les un une des et est dans avec sur du el los las una "
        "y en con por para il lo gli di della nel o os um uma e na com het een van op met zijn",
    )
)
MARKED = 0.05  # share of letters with marks from which a Latin text is not taken for English


def language_of(text: str) -> str:
    """Return "en", "zh", "ja", "ko", "latin" (another language in Latin letters), "other", or "" without letters."""
    letters = [char for char in unicodedata.normalize("NFC", text) if char.isalpha()]
    if not letters:
        return ""
    counts = {name: sum(bool(script.match(char)) for char in letters) for name, script in _SCRIPTS}
    if counts["ja"] * 10 > counts["zh"]:  # a Chinese text that quotes one kana stays Chinese
        counts["ja"] += counts.pop("zh")
    # a Han character says as much as some three letters: "一只猫, iPhone" is Chinese
    weighted = {name: count * (1 if name == "latin" else 3) for name, count in counts.items()}
    best = max(weighted, key=weighted.__getitem__)
    if 2 * sum(counts.values()) < len(letters):
        return "other"
    return _latin(text, letters) if best == "latin" else best


def _latin(text: str, letters: list[str]) -> str:
    marked = sum(not char.isascii() for char in letters) / len(letters)
    words = re.findall(r"[^\W\d_]+", text.casefold())
    foreign, english = (sum(word in known for word in words) for known in (_NEIGHBOURS, _ENGLISH))
    return "latin" if marked > MARKED or foreign > english else "en"
