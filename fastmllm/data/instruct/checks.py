"""What is wrong with a question and answer that a language model wrote about an image that it did not see."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from fastmllm.data.filtering.text_print import words_of
from fastmllm.data.text import normalise

ALIKE = 0.7  # share of words in common from which two questions about one image are one
# Words that carry no answer; the rest of a short answer must not all stand in its question.
_EMPTY = frozenset(
    re.split(
        " ",
        "a an the is are was were it its this that there in on at of to and with for by be has have he she they some "
        "one 的 了 是 在 一 个 有 它 这 那 和",
    )
)
_YES_NO = re.compile(r"\s*(?:yes|no|true|false|是的?|否|有|没有|不是|对|不对)(?![A-Za-z])", re.IGNORECASE)
_ABSENT = re.compile(r"\b(?:no|not|none|neither|nor|without|isn't|aren't|doesn't)\b|没有|不是|无|否", re.IGNORECASE)
_EITHER_OR = re.compile(r"\bor\b|还是|或", re.IGNORECASE)
_SOURCE = re.compile(
    r"\b(?:captions?|descriptions?|bounding box(?:es)?|annotations?|notes?|coordinates?) (?:say|state|mention|describe|"
    r"provide|indicate|given|above|list)|(?:according to|based on|in|from) the (?:provided |given )?(?:captions?|"
    r"descriptions?|notes?|annotations?|coordinates?|bounding boxes)|\[\s*0?\.\d+\s*,|as an ai\b|"
    r"根据(?:标题|描述|笔记|文字|坐标)|(?:标题|描述|笔记|位置框)(?:中|里|提到|说明)",
    re.IGNORECASE,
)
_UNCERTAIN = re.compile(
    r"\b(?:cannot|can't|can not|could not|not possible to|impossible to|unable to|hard to|difficult to) (?:be )?"
    r"(?:determined?|tell|say|see|know|identif)|\bnot (?:clear|visible enough|specified|mentioned|stated|known)|"
    r"\bunclear\b|\bunknown\b|\bno information\b|\b(?:might|may|could) (?:be|have)\b|\bprobably\b|\bperhaps\b|"
    r"无法(?:确定|判断|看出|得知)|不清楚|不确定|没有(?:说明|提到|提供)|可能是|也许",
    re.IGNORECASE,
)
_UNSEEN = re.compile(
    r"\bwhat(?:'s| is| was| are) (?:the |his |her |its |their )?(?:names?|price|cost|brand|age|phone|address)\b|"
    r"\bhow (?:old|much does|expensive|long has|long have|heavy)\b|\bwho (?:took|made|owns|bought)\b|"
    r"\b(?:what|which) (?:year|date|day|month|country|city)\b|\bwhen (?:was|were|did)\b|\bwhat (?:happened|will happen|"
    r"happens) (?:before|after|next)\b|\bwhat (?:is|are|was) .{0,40}\b(?:thinking|feeling|saying)\b|"
    r"叫什么名字|多少钱|价格|几岁|多大年纪|哪一年|什么时候|之前发生|之后发生|在想什么|谁拍的",
    re.IGNORECASE,
)


def parse_pairs(reply: str) -> list[tuple[str, str]]:
    """Read `Question: ... === Answer: ... ===` (LLaVA-Instruct's form), or the Chinese 问题/回答.

    Returns:
        Pairs in their order; nothing where a question lacks its answer, an answer its question, or text stands outside.
    """
    pieces = [piece.strip() for piece in re.split(r"^\s*={3,}\s*$", reply, flags=re.MULTILINE) if piece.strip()]
    found = [re.fullmatch(r"(question|answer|问题|回答)\s*[:：]\s*(.+)", p, re.IGNORECASE | re.DOTALL) for p in pieces]
    said = [(match[1].casefold() in ("question", "问题"), match[2].strip()) for match in found if match is not None]
    questions, answers = said[0::2], said[1::2]
    whole = len(said) == len(pieces) and len(questions) == len(answers)
    if not whole or not all(is_question for is_question, _ in questions) or any(asks for asks, _ in answers):
        return []
    return [(question, answer) for (_, question), (_, answer) in zip(questions, answers, strict=True)]


def fault(
    question: str, answer: str, *, facts: str, labels: Collection[str] = (), earlier: Sequence[str] = ()
) -> tuple[str, str] | None:
    """Return what speaks against a pair, (reason, detail), or None.

    Args:
        question, answer: of the model.
        facts: that it was told.
        labels: of things that other images hold; one that these facts lack may only be asked for with an answer that
            says so.
        earlier: questions already asked about this image.
    """
    words = set(words_of(question))
    for other in earlier:
        known = set(words_of(other))
        if len(words & known) >= ALIKE * len(words | known):
            return "repeated question", f"like {other!r}"
    if found := _SOURCE.search(question) or _SOURCE.search(answer):
        return "speaks of its source", found[0]
    if leaks(question, answer):
        return "answer in the question", f"{answer!r} stands in {question!r}"
    if found := _UNCERTAIN.search(answer):
        return "uncertain answer", found[0]
    if found := _UNSEEN.search(question):
        return "image cannot answer", found[0]
    missing = _absent(question, facts, labels)
    if missing and not _ABSENT.search(answer):
        return "asks for what is not there", f"{missing!r} is not in the facts, and the answer does not say so"
    return None


def leaks(question: str, answer: str) -> bool:
    """Tell whether a short answer stands in its own question; yes, no and choices offered do rightly."""
    told = [word for word in words_of(answer) if word not in _EMPTY]
    if not told or len(told) > 5 or _YES_NO.match(answer) or _EITHER_OR.search(question):
        return False
    return set(told) <= set(words_of(question))


def _absent(question: str, facts: str, labels: Collection[str]) -> str:
    asked, known = f" {normalise(question)} ", f" {normalise(facts)} "
    for label in labels:
        text = normalise(label)
        plain = f" {text} " if text.isascii() else text  # Chinese has no spaces
        forms = (plain, f" {text}s ") if text.isascii() else (plain,)
        if any(form in asked for form in forms) and text not in known:
            return label
    return ""
