"""Short answers: the normalisation and the accuracy of VQA (Antol et al., arXiv 1505.00468; VQAv2, TextVQA)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS.split())}
_ARTICLES = {"a", "an", "the"}
# The official table holds each of these with one apostrophe left out, and three lines of its own. "I'd've", "I'm" and
# "I've" stand there in capitals, which lower-case words never meet.
_WITH_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _WITH_APOSTROPHES.split()
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def strip_punctuation(text: str) -> str:
    """Drop or blank punctuation as VQA's evaluation does.

    Its pattern for full stops means to spare decimals and has a slip (`(?!<=` for `(?<=`), and its flag stands where
    the count belongs: a full stop goes unless a digit follows, the first 32 of them.
    """
    out = text
    spaced = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if spaced or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)


def normalise_answer(text: str) -> str:
    """Fold an answer as VQA's evaluation does: punctuation, case, numbers up to ten, articles, contractions."""
    flat = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(w, w) for w in strip_punctuation(flat).lower().split()]
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


def vqa_accuracy(answer: str, answers: Sequence[str], compat: Literal["vqa"] | None = None) -> float:
    """Score an answer by those of the annotators: the mean, over leaving one of them out, of min(1, matches / 3).

    Args:
        answer: generated.
        answers: of the annotators, ten in VQAv2 and TextVQA.
        compat: "vqa": the official script, which normalises neither side where all annotators agree, so that "Yes"
            is then wrong for ten times "yes".

    Raises:
        ValueError: no annotators, or an unknown `compat`.
    """
    if compat not in (None, "vqa"):
        raise ValueError(f"eval: compat {compat!r} is unknown; known: vqa, or None")
    if not answers:
        raise ValueError("vqa_accuracy: no answers to compare with; leave the question out")
    if compat == "vqa" and len(set(answers)) == 1:
        said, truths = answer.replace("\n", " ").replace("\t", " ").strip(), list(answers)
    else:
        said, truths = normalise_answer(answer), [normalise_answer(a) for a in answers]
    matches = sum(t == said for t in truths)
    if len(truths) == 1:
        return float(matches)  # nobody is left to compare with
    left_out = [min(1.0, (matches - (t == said)) / 3) for t in truths]
    return sum(left_out) / len(left_out)
