"""AMBER in the format of junyangwang0410/AMBER: 14,216 yes/no questions, and 1,004 descriptions checked for objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from fastmllm.data.sample import Sample
from fastmllm.eval import amber
from fastmllm.eval.intervals import Estimate, statistic
from fastmllm.eval.parsing import parse_yes_no
from fastmllm.eval.sets.reading import Loaded, Reader, RowError, SetError, text_of
from fastmllm.eval.task import Metric, Scored, Task, among, as_it_is, of_sums

LAYOUT = (
    "query_all.json, annotations.json, relation.json, safe_words.txt (github.com/junyangwang0410/AMBER, data) and its "
    "1,004 images in image/"
)
DIMENSIONS = ("all", "existence", "attribute", "state", "number", "action", "relation")


def load_amber(
    folder: str | Path, images: bool = True, synonyms: Mapping[str, Collection[str]] | None = None
) -> Loaded:
    """Load AMBER: a task of yes/no questions and one of descriptions. Queries meet annotations by their id.

    Args:
        folder: see `LAYOUT`.
        images: see `Reader`.
        synonyms: of `amber.generative_counts`, in place of spaCy's vectors; None = the file synonyms.json of the
            folder (word -> words) where there is one.

    Raises:
        SetError: a file is missing, or is not what it should be.
    """
    reader = Reader("amber", folder, LAYOUT, images)
    notes = {a.get("id"): a for a in reader.json(reader.file("annotations.json"), list) if isinstance(a, dict)}
    rows = list(enumerate(reader.json(reader.file("query_all.json"), list)))
    association = reader.json(reader.file("relation.json"), dict)
    safe = set(reader.file("safe_words.txt").read_text(encoding="utf-8").split())
    if synonyms is None:
        own = reader.folder / "synonyms.json"
        synonyms = reader.json(own, dict) if own.is_file() else {}
    for word, words in (*association.items(), *synonyms.items()):
        if isinstance(words, str) or not all(isinstance(w, str) for w in words):
            raise SetError(f"amber: {word!r} has {words!r}, not a list of words, in relation.json or synonyms.json")
    samples = reader.samples(
        ((f"query_all.json, row {place}", row) for place, row in rows), partial(_sample, reader, notes)
    )
    reader.expect("questions", len(samples), 15220)
    asked = [s for s in samples if s.task == "amber"]
    metrics: dict[str, Metric] = {"accuracy": _of("all", "accuracy"), "F1": _of("all", "F1")}
    metrics |= {f"{score}, {d}": _of(d, score) for d in DIMENSIONS[1:] for score in ("accuracy", "F1")}
    metrics |= {f"F1, {d}, amber": partial(_published, d) for d in DIMENSIONS}  # type: ignore[dict-item]
    vocabulary = amber.vocabulary_of(association)

    def count(text: str | None, sample: Sample) -> dict[str, float]:
        nouns = amber.nouns_of(text or "", vocabulary)
        return amber.generative_counts(
            nouns, sample.truth["objects"], sample.truth["likely"], association, safe, synonyms or {}
        )

    reader.loaded.tasks = [
        Task(
            name="amber", documents=asked, prompt=lambda sample: sample, closed=("No", "Yes"), metrics=metrics,
            parse=lambda text, sample: parse_yes_no(text), score=_score,
        ),
        Task(
            name="amber, descriptions", documents=[s for s in samples if s.task != "amber"],
            prompt=lambda sample: sample, parse=as_it_is, score=count, reads=False, max_new_tokens=256,
            metrics={name: _generative(name) for name in ("CHAIR", "Cover", "Hal", "Cog")},
        ),
    ]  # fmt: skip
    return reader.loaded


def _sample(reader: Reader, notes: Mapping, row: Mapping) -> Sample:
    if (note := notes.get(row["id"])) is None:
        raise RowError("no annotation of this id")
    name, image = text_of(row, "image"), ""
    image = reader.image(f"image/{name}", f"images/{name}", name)
    if note["type"] == "generative":
        truth = {"objects": list(note["truth"]), "likely": list(note["hallu"])}
        answer = f"The image shows {', '.join(dict.fromkeys(truth['objects']))}."
        return Sample(
            id=str(row["id"]),
            prompt=text_of(row, "query"),
            answer=answer,
            task="descriptions",
            image=image,
            truth=truth,
        )
    if note["type"] not in amber.DIMENSIONS or note["truth"] not in ("yes", "no"):
        raise RowError("unknown type or truth")
    return Sample(
        id=str(row["id"]), prompt=text_of(row, "query"), answer=note["truth"].capitalize(), task="amber", image=image,
        source=note["type"],
    )  # fmt: skip


def _score(parsed: str | None, sample: Sample) -> dict[str, float]:
    truth = sample.answer.lower()
    return {"right": float(parsed == truth)} | amber.discriminative_counts(parsed, truth, sample.source)  # type: ignore[arg-type]


def _value(sums: Mapping[str, float], dimension: str, score: str) -> float:
    return amber.discriminative(sums).get(dimension, {}).get(score, 0.0) / 100


def _of(dimension: str, score: str) -> Metric:
    return among(lambda s: _within(s, dimension), of_sums(lambda sums: _value(sums, dimension, score)))


def _within(sample: Sample, dimension: str) -> bool:
    own = amber.DIMENSIONS[sample.source]
    return dimension in ("all", own) or (dimension == "attribute" and own in amber.ATTRIBUTES)


def _generative(name: str) -> Metric:
    return of_sums(lambda sums: amber.generative(sums)[name] / 100)


def _published(dimension: str, scored: Sequence[Scored], seed: int) -> Estimate:
    """Read the same answers as AMBER's scorer does: "Yes" or "No", to the letter."""
    scored = [s for s in scored if _within(s.sample, dimension)]
    counts = [
        amber.discriminative_counts(amber.exact_verdict(s.said or ""), s.sample.answer.lower(), s.sample.source)
        for s in scored
    ]
    return statistic(counts, lambda sums: _value(sums, dimension, "F1"), [s.cluster for s in scored], seed)
