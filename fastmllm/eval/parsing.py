"""Read a verdict, a choice or a count out of generated text. What cannot be read is `None`: wrong, and reported."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Literal

from fastmllm.data.text import normalise
from fastmllm.eval import compat as published

Verdict = Literal["yes", "no"]

_YES = frozenset({"yes", "yeah", "yep", "true", "correct"})
_NO = frozenset({"no", "nope", "false", "incorrect"})
_IDIOM = re.compile(r"no (?:doubt|question|wonder|idea|problem)\b")  # "No doubt there is." denies nothing
_UNSURE = re.compile(
    r"\b(?:(?:un)?sure|(?:un)?clear|(?:un)?certain|determine|tell|know|(?:im)?possible|ambiguous|unable|sorry|maybe"
    r"|perhaps|whether)\b|不确定|不知道|不清楚|无法|難以|难以|不好说|看不清|也许|可能|抱歉|是不是|有没有|是否"
)
_BE = r"(?:is|are|was|were|does|do|did|has|have|can|seems? to be|appears? to be)"
_DENIAL = re.compile(
    rf"(?:there|it|this|that|they|(?:the|these|those)(?: [\w'-]+){{1,6}}?) "
    rf"(?:{_BE} (?:\w+ly )?(?:no|not)\b|(?:is|are|was|were|does|do|did|has|have|can|ca)n't\b|cannot\b"
    r"|(?:contains?|shows?|depicts?|includes?) no\b)"
)
_ABSENT = re.compile(r"no .*\b(?:visible|present|seen|shown|there|depicted|found|in (?:the|this))\b")
_LEAD = re.compile(r"(?:(?:the |my |final )*answer(?: is)?|answer)\s*[:：]?\s*|(?:答案|回答|答)(?:是|为)?\s*[:：]?\s*")
_YES_ZH = re.compile(r"没错|(?:是|有|对|正确|存在|可以看到|能看到|看得到)(?![不没否])")
_NO_ZH = re.compile(
    r"不|否|没|无|错|并不|并没|并非|(?:图|照片|画|这|那|其中|里面)[^。，！？,.!?]*?(?:没有|没看到|不存在|不是|不在|并非|看不到)"
)


def parse_yes_no(
    text: str, compat: Literal["pope", "lmms-eval", "vlmevalkit"] | None = None
) -> Literal["yes", "no"] | None:
    """Read yes or no, English or Chinese, from the first word, else from an unmistakable denial; None if unclear.

    "There is not a dog." is no, "There isn't any dog." is no, "Yes, and there is no cat." is yes; a refusal, "yes and
    no" and "There is a dog." (of which question?) are None.

    Args:
        text: generated.
        compat: read as a published scorer does, with its bugs: "pope" (POPE's and LLaVA's), "lmms-eval", "vlmevalkit"
            (its rule without the judge).

    Raises:
        ValueError: an unknown `compat`.
    """
    if compat is not None:
        return _rule(published.YES_NO, compat)(text)
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("*", "").strip()
    sentences = [s.strip(" \t\"'`([{<>,;:") for s in re.split(r"[.!?。！？\n]+", _LEAD.sub("", folded, count=1))]
    for place, sentence in enumerate(s for s in sentences if s):
        if (verdict := _verdict(sentence, first=place == 0)) is not None:
            return verdict
        if _UNSURE.search(sentence):
            return None
    return None


def _verdict(sentence: str, first: bool) -> Verdict | None:
    words = re.findall(r"[\w']+", sentence)
    if words and words[0] in _YES | _NO and not _IDIOM.match(sentence):
        if len({w in _YES for w in words[:3] if w in _YES | _NO}) > 1:
            return None  # "yes and no", "yes/no"
        if not first and words[0] == "no" and not _ABSENT.match(sentence) and len(words) > 1:
            return None  # "… No cat." behind another statement is about something else
        return "yes" if words[0] in _YES else "no"
    if _UNSURE.search(sentence):
        return None
    if _YES_ZH.match(sentence):
        return "yes"
    return "no" if _DENIAL.match(sentence) or _NO_ZH.match(sentence) else None


def parse_choice(
    text: str,
    choices: Sequence[str],
    *,
    letters: bool = False,
    compat: Literal["llava", "lmms-eval", "vlmevalkit"] | None = None,
) -> str | None:
    """Return the choice that the text is, or the only one that it contains as whole words; None if unclear.

    Args:
        text: generated.
        choices: the options.
        letters: the prompt called them A, B, C, …: "B", "(b)", "B. red", "The answer is B" and "选B" are then the
            second one. A letter beside the text of another option is unclear.
        compat: read as a published scorer does: "llava" (ScienceQA), "lmms-eval" (ScienceQA), "vlmevalkit"
            (`can_infer`; its judge and its random choice are left out).

    Raises:
        ValueError: an unknown `compat`.
    """
    if compat is not None:
        place = _rule(published.CHOICE, compat)(text, choices)
        return None if place is None else choices[place]
    answer = normalise(text)
    by_text = {normalise(c): c for c in choices}
    if answer in by_text and not (letters and len(answer) == 1):
        return by_text[answer]
    if letters and (lettered := _lettered(text, choices)) is not None:
        named = _contained(answer, by_text)
        return lettered if named in (lettered, None) else None
    return _contained(answer, by_text)


def _contained(answer: str, by_text: dict[str, str]) -> str | None:
    found = {c for key, c in by_text.items() if key and re.search(rf"(?<!\w){re.escape(key)}(?!\w)", answer)}
    # "green apple" contains "apple": the longest mention wins when it covers the others
    longest = max(found, key=len, default=None)
    return longest if longest is not None and all(normalise(f) in normalise(longest) for f in found) else None


def _lettered(text: str, choices: Sequence[str]) -> str | None:
    folded = unicodedata.normalize("NFKC", text).replace("*", "").strip()
    known = string.ascii_uppercase[: len(choices)]
    if found := re.match(r"[(\[]?([A-Za-z])[)\].:,、]*$", folded):
        letter = found[1].upper()
    elif found := re.match(r"\(([A-Z])\)|\[([A-Z])\]|([A-Z])[).:、](?!\w)", folded):
        letter = next(g for g in found.groups() if g)
    else:
        named = re.findall(r"(?i:answer|option|choice)(?i: is)?:? *[(\[]?([A-Z])(?![\w'])", folded)
        named += re.findall(r"(?:答案|选项?)(?:是|为)?:? *[(\[]?([A-Z])(?![A-Za-z])", folded)
        if len(set(named)) != 1:
            return None
        letter = named[0]
    return choices[known.index(letter)] if letter in known else None


_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_NUMBERS = {word: number for number, word in enumerate(_WORDS.split())} | {"none": 0, "no": 0}
_DIGITS_ZH = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}


def parse_count(text: str) -> int | None:
    """Read the one number of a text, in digits or words, English or Chinese; None where there is none, or several.

    "There are no dogs" is 0, "two or three" is None, "1,200" is 1200, a fraction or a negative number is None.
    """
    folded = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", unicodedata.normalize("NFKC", text).casefold())
    if re.search(r"\d\s*[./]\s*\d|-\s*\d", folded):
        return None
    found = {int(n) for n in re.findall(r"\d+", folded) if len(n) < 10}
    found |= {_NUMBERS[w] for w in re.findall(r"[a-z]+", folded) if w in _NUMBERS}
    found |= {_count_zh(n) for n in re.findall(r"[零〇一二两三四五六七八九十]+", folded)}
    if not found and re.search("没有|沒有", folded):
        return 0
    return found.pop() if len(found) == 1 else None


def _count_zh(word: str) -> int:
    tens, ten, ones = word.rpartition("十")
    if not ten:
        return int("".join(str(_DIGITS_ZH[c]) for c in word))
    return 10 * (_DIGITS_ZH[tens[-1]] if tens else 1) + (_DIGITS_ZH[ones[0]] if ones else 0)


def _rule(rules, compat):
    if compat not in rules:
        raise ValueError(f"eval: compat {compat!r} is unknown; known: {', '.join(rules)}, or None for our own rule")
    return rules[compat]
