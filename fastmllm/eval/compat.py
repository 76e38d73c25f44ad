"""Answers as published scorers read them, bugs included, so that their numbers can be had beside ours."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import Literal

from fastmllm.eval.vqa import strip_punctuation

Verdict = Literal["yes", "no"]


def _pope(text: str) -> Verdict:
    """POPE `evaluate.py`, LLaVA `eval_pope.py`: the first sentence; all that holds no "No", "no" or "not" is yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _lmms_eval(text: str) -> Verdict | None:
    """lmms-eval `tasks/pope/utils.py`: the bare word, or nothing."""
    said = text.lower().strip()
    return "yes" if said == "yes" else "no" if said == "no" else None


def _vlmevalkit(text: str) -> Verdict | None:
    """VLMEvalKit `utils/yorn.py`: exactly one of the two words, anywhere; "Unknown" (then a judge) is None."""
    words = set(strip_punctuation(text.lower()).split())
    return None if ("yes" in words) == ("no" in words) else "yes" if "yes" in words else "no"


YES_NO: dict[str, Callable[[str], Verdict | None]] = {
    "pope": _pope,
    "lmms-eval": _lmms_eval,
    "vlmevalkit": _vlmevalkit,
}


def _place(letter: str, choices: Sequence[str]) -> int | None:
    place = string.ascii_uppercase.find(letter)
    return place if 0 <= place < len(choices) else None


def _llava_choice(text: str, choices: Sequence[str]) -> int | None:
    """LLaVA `eval_science_qa.py`: a letter of A to E, "X. …", or one "The answer is X" and any character."""
    if text in tuple("ABCDE"):
        return _place(text, choices)
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return _place(text[0], choices)
    found = re.findall(r"The answer is ([A-Z]).", text)
    return _place(found[0], choices) if len(found) == 1 and found[0] in "ABCDE" else None


def _lmms_eval_choice(text: str, choices: Sequence[str]) -> int | None:
    """lmms-eval `tasks/scienceqa/utils.py`: the bare letter in either case, or a capital and a full stop."""
    if len(said := text.strip().upper()) == 1:
        return _place(said, choices)
    return _place(text[0], choices) if len(text) >= 2 and text[0].isupper() and text[1] == "." else None


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def _vlmevalkit_choice(text: str, choices: Sequence[str]) -> int | None:
    """VLMEvalKit `can_infer`: the one letter among the last tokens, else the one option that the text contains.

    Where that fails it asks a judge, and after three failures draws an answer unseeded; here both are None.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return None  # its "Z", which is wrong for every question
    options = string.ascii_uppercase[: len(choices)]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return options.index(found[0])
    if not found and "Z" in words:
        return None
    if len(text) > 2 * sum(map(len, choices)):
        return None
    contained = [i for i, choice in enumerate(choices) if choice.lower() in text.lower()]
    return contained[0] if len(contained) == 1 else None


CHOICE: dict[str, Callable[[str, Sequence[str]], int | None]] = {
    "llava": _llava_choice,
    "lmms-eval": _lmms_eval_choice,
    "vlmevalkit": _vlmevalkit_choice,
}
