"""Question, caption and box sets as instructions: templates chosen by language, phrasings drawn by seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastmllm.data.augment import rng_of
from fastmllm.data.conversation import PLACEHOLDER, RecordError, image_names
from fastmllm.data.filtering.language import language_of
from fastmllm.data.instruct.questions import QUESTIONS, Question
from fastmllm.data.instruct.templates import Templates
from fastmllm.data.records import Record
from fastmllm.data.shard_index import Skipped


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptConfig:
    """How a set is put into words.

    Args:
        kind: of its records, "vqa", "caption" or "boxes"; `questions` says their columns.
        seed: of phrasings, and of what is asked about boxes.
        formats: share of samples that say how to answer, 0-1.
        per_image: questions about the boxes of an image, at most; vqa and caption have as many as the record.
        labels: of the whole set, with how often each stands in it (`labels_of`): absent ones are asked for by that, so
            that frequency alone does not tell them; empty = no question of existence.
    """

    kind: str
    seed: int = 0
    formats: float = 1.0
    per_image: int = 4
    labels: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in QUESTIONS:
            raise ValueError(f"adapt: kind {self.kind!r} is none of {', '.join(QUESTIONS)}")
        if not 0.0 <= self.formats <= 1.0 or self.per_image < 1:
            raise ValueError(f"adapt: formats {self.formats} must be in 0-1 and per_image {self.per_image} at least 1")


def adapt(
    records: Iterable[Record | Skipped], templates: Sequence[Templates], config: AdaptConfig, *, source: str = ""
) -> Iterator[Mapping[str, Any] | Skipped]:
    """Yield LLaVA records that `SourceConfig` reads, and what could not be asked.

    Args:
        records: as `read_records` gives them.
        templates: at most one a language, of the config's kind; a sample takes those of its own words' language.
        config: see there.
        source: of the records, for the list of what was left out.

    Raises:
        ValueError: no templates, two of a language, or of another kind.
    """
    by_language = {one.language: one for one in templates if one.kind == config.kind}
    if not templates or len(by_language) < len(templates):
        kinds = ", ".join(f"{one.name} ({one.kind}, {one.language})" for one in templates) or "none"
        raise ValueError(f"adapt: {kinds}: give one template file a language, of kind {config.kind}")
    for record in records:
        if isinstance(record, Skipped):
            yield record
            continue
        try:
            images = image_names(record.data)
            asked = list(QUESTIONS[config.kind](record, config))
        except RecordError as error:
            yield Skipped(shard=source, key=record.key, reason=error.reason, detail=error.detail)
            continue
        for number, question in enumerate(asked):
            name = record.id if len(asked) == 1 else f"{record.id}/{number}"
            language = language_of(question.words)
            if (chosen := by_language.get(language, by_language.get("en") if not language else None)) is None:
                detail = f"{question.words[:60]!r} is in {language}, templates are in {', '.join(by_language)}"
                yield Skipped(shard=source, key=f"{record.key}/{number}", reason="no template", detail=detail)
                continue
            yield _worded(name, images, question, chosen, config, record.key)


def _worded(
    name: str, images: Sequence[str], question: Question, templates: Templates, config: AdaptConfig, key: str
) -> dict[str, Any]:
    generator = rng_of("adapt", config.seed, templates.name, key, name, question.task)
    names = dict(question.names)
    if question.options:
        names["options"] = "\n".join(
            templates.words["option"].format(letter=letter, text=text) for letter, text in question.options
        )
    names["answer"] = templates.words[question.answer] if question.task == "exists" else question.answer
    phrasings = templates.tasks.get(question.task)
    if phrasings is None:
        raise ValueError(f"templates {templates.name}: no phrasing for task {question.task!r}; add some")
    number = int(generator.integers(len(phrasings)))
    prompt, answer = (text.format_map(names) for text in phrasings[number])
    form = _form(templates, question, generator) if generator.random() < config.formats else ""
    prompt = PLACEHOLDER * len(images) + "\n" * bool(images) + prompt + ("\n" + form if form else "")
    return {
        "id": name,
        **({"image": list(images) if len(images) > 1 else images[0]} if images else {}),
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}],
        "made": {"by": "adapt", "templates": templates.name, "task": question.task, "phrasing": number},
    }


def _form(templates: Templates, question: Question, generator: np.random.Generator) -> str:
    forms = templates.formats.get(question.form) or ("",)
    return forms[int(generator.integers(len(forms)))]
