"""What a record of a known set asks, before it is put into words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmllm.data.augment import rng_of
from fastmllm.data.conversation import PLACEHOLDER, RecordError
from fastmllm.data.filtering.language import language_of
from fastmllm.data.records import Record
from fastmllm.data.shard_index import Skipped

if TYPE_CHECKING:
    from fastmllm.data.instruct.adapt import AdaptConfig

_YES_NO = {"yes", "no", "是", "否", "有", "没有", "对", "不对"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question and its answer.

    Args:
        task: of a template file.
        form: which of its formats says how to answer.
        words: of the record, whose language decides the template.
        names: for the phrasing.
        answer: text; "yes" and "no" are the templates' words for it where they have some.
        options: (letter, text).
    """

    task: str
    form: str
    words: str
    names: Mapping[str, str]
    answer: str
    options: Sequence[tuple[str, str]] = field(default=())


def _text(data: Mapping[str, Any], *columns: str) -> str:
    for column in columns:
        if isinstance(value := data.get(column), str) and value.strip():
            if PLACEHOLDER in value:
                raise RecordError("misplaced image", f"{PLACEHOLDER} in {column}: the image goes in front by itself")
            return value.strip()
    raise RecordError("wrong columns", f"no text in {' or '.join(columns)}; columns: {', '.join(map(str, data))[:200]}")


def _vqa(record: Record, config: AdaptConfig) -> Iterator[Question]:
    """Columns: question; answer (text, or an option's index or letter), or answers (texts, VQA's {answer}); choices."""
    data = record.data
    question = _text(data, "question", "sent", "prompt")
    choices = data.get("choices") or data.get("options")
    if choices is not None:
        if not isinstance(choices, list) or not 2 <= len(choices) <= 26 or not all(isinstance(c, str) for c in choices):
            raise RecordError("wrong columns", f"choices {str(choices)[:80]}: give 2 to 26 texts")
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        place = _choice(data.get("answer"), choices, letters)
        names = {"question": question}
        options = tuple(zip(letters, choices, strict=True))
        yield Question(
            task="choose", form="choose", words=question, names=names, answer=letters[place], options=options
        )
        return
    answer = (
        _voted(data["answers"]) if data.get("answers") else _text(data, "answer", "label", "multiple_choice_answer")
    )
    folded = answer.casefold()
    form = "yes_no" if folded in _YES_NO else "number" if re.fullmatch(r"\d+", folded) else "short"
    yield Question(task="ask", form=form, words=question, names={"question": question}, answer=answer)


def _choice(answer: Any, choices: Sequence[str], letters: Sequence[str]) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
    elif isinstance(answer, str):
        for known in (choices, letters):
            if known.count(answer.strip()) == 1:
                return known.index(answer.strip())
    raise RecordError("answer out of range", f"{answer!r} of {len(choices)} choices")


def _voted(answers: Any) -> str:
    """Return the commonest of several answers, the first of equals."""
    rows = answers if isinstance(answers, list) else [None]
    texts = [item.get("answer") if isinstance(item, dict) else item for item in rows]
    good = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if len(good) < len(texts):
        raise RecordError("wrong columns", f"answers {str(answers)[:80]}: give texts or {{answer: text}}")
    return Counter(good).most_common(1)[0][0]


def _caption(record: Record, config: AdaptConfig) -> Iterator[Question]:
    """Columns: caption (text), or captions (texts), of which each becomes a sample."""
    captions = record.data.get("captions") or [_text(record.data, "caption", "text")]
    if not isinstance(captions, list) or not all(isinstance(text, str) and text.strip() for text in captions):
        raise RecordError("wrong columns", f"captions {str(captions)[:80]}: give texts")
    for text in captions:
        yield Question(task="describe", form="describe", words=text, names={}, answer=text.strip())


def _boxes(record: Record, config: AdaptConfig) -> Iterator[Question]:
    """Columns: width, height in pixels; boxes of {label, box: [x1, y1, x2, y2]} or COCO's {label, bbox: [x, y, w, h]}.

    Asked are: where a thing is that is there once, what is in a box, how many, and, as often for what is there as for
    what is not, whether it is there.
    """
    found = things_of(record.data)
    counts = Counter(label for label, _ in found)
    generator = rng_of("boxes", config.seed, record.key, record.id)
    asked: list[Question] = []
    for label, box in found:
        if counts[label] == 1:
            asked.append(Question(task="locate", form="locate", words=label, names={"label": label}, answer=box))
        asked.append(Question(task="name", form="name", words=label, names={"box": box}, answer=label))
    for label, count in counts.items():
        asked.append(Question(task="count", form="count", words=label, names={"label": label}, answer=str(count)))
    pairs = list(_existence(counts, config, generator))[: config.per_image // 2 * 2]
    rest = generator.permutation(len(asked))[: config.per_image - len(pairs)]
    yield from (asked[i] for i in sorted(rest))
    yield from pairs


def _existence(counts: Mapping[str, int], config: AdaptConfig, generator: np.random.Generator) -> Iterator[Question]:
    """Ask for things that are there and, as often, for things that are not, drawn by how often others hold them."""
    for number, place in enumerate(generator.permutation(len(counts))[: max(1, config.per_image // 4)]):
        there = sorted(counts)[int(place)]
        language = language_of(there)
        absent = sorted(label for label in config.labels if label not in counts and language_of(label) == language)
        if not absent:
            return
        weights = np.array([config.labels[label] for label in absent], dtype=np.float64)
        other = absent[int(generator.choice(len(absent), p=weights / weights.sum()))]
        for name, truth in [(there, "yes"), (other, "no")][:: -1 if number % 2 else 1]:
            yield Question(task="exists", form="exists", words=name, names={"label": name}, answer=truth)


def labels_of(records: Iterable[Record | Skipped]) -> Counter[str]:
    """Count the labels of a box set, once for each image."""
    counts: Counter[str] = Counter()
    for record in records:
        with suppress(RecordError):
            counts.update({label for label, _ in things_of(record.data)} if isinstance(record, Record) else ())
    return counts


def things_of(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, box as text) of each thing, checked against the image's size."""
    width, height = data.get("width"), data.get("height")
    if not (isinstance(width, int | float) and isinstance(height, int | float) and width > 0 and height > 0):
        raise RecordError("wrong columns", f"width and height are {width!r} and {height!r}; give pixels")
    things = data.get("boxes") or data.get("objects") or data.get("annotations")
    if not isinstance(things, list) or not things:
        raise RecordError("wrong columns", f"no boxes; columns: {', '.join(map(str, data))[:200]}")
    found = []
    for thing in things:
        label = _text(thing, "label", "category", "name") if isinstance(thing, dict) else ""
        corners = (thing.get("box") or thing.get("bbox")) if label else None
        if not isinstance(corners, list) or len(corners) != 4 or not all(isinstance(c, int | float) for c in corners):
            raise RecordError("wrong columns", f"{str(thing)[:80]}: give a label and four numbers")
        x1, y1, x2, y2 = corners
        if "box" not in thing:  # COCO's corner and sides
            x2, y2 = x1 + x2, y1 + y2
        if not (0 <= x1 < x2 <= width + 1 and 0 <= y1 < y2 <= height + 1):  # COCO's own boxes overhang by a fraction
            raise RecordError("answer out of range", f"{label} {corners} in an image of {width} x {height}")
        shares = (x1 / width, y1 / height, min(1.0, x2 / width), min(1.0, y2 / height))
        found.append((label, f"[{', '.join(f'{share:.2f}' for share in shares)}]"))
    return found


QUESTIONS: dict[str, Callable[[Record, AdaptConfig], Iterator[Question]]] = {
    "vqa": _vqa,
    "caption": _caption,
    "boxes": _boxes,
}
