"""Tasks of images whose truth is known exactly: naming, groups, yes/no, counts, forced choice, captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastmllm.data.sample import Sample
from fastmllm.data.text import normalise
from fastmllm.eval.captions import CiderD, chair
from fastmllm.eval.hallucination import contrast_choice, contrast_yes_no
from fastmllm.eval.parsing import parse_choice, parse_yes_no
from fastmllm.eval.task import Metric, Task, as_it_is, mean_of, share_of

CAPTIONS = ("caption", "scene", "hallucination_caption", "hallucination_caption_zh")


def tasks_of(samples: Mapping[str, Sequence[Sample]], train: Mapping[str, Sequence[Sample]]) -> list[Task]:
    """Make a task of each list of questions.

    Args:
        samples: task -> held-out questions. `exists` is forced choice by log-probability; `caption` and `scene` are
            scored by CIDEr-D and CHAIR; `hallucination…` as `fastmllm.eval.hallucination` says; yes/no answers are
            parsed strictly; the rest is exact match.
        train: task -> training questions, for the majority answer and the closed sets.
    """
    made = []
    for name, items in samples.items():
        if name.startswith("hallucination") and name not in CAPTIONS:
            made.append((contrast_choice if "choice" in name else contrast_yes_no)(name, list(items)))
            continue
        known = list(train.get(name, ()))
        make = _forced_choice if name == "exists" else _captions if name in CAPTIONS else _exact_match
        made.append(make(name, list(items), known))
    return made


def _itself(sample: Sample) -> Sample:
    return sample


def _exact_match(name: str, items: list[Sample], known: list[Sample]) -> Task:
    closed = sorted({s.answer for s in (*known, *items)} | {c for s in items for c in s.choices})
    if {normalise(c) for c in closed} <= {"yes", "no"}:
        return yes_no(name, items, known)

    def parse(text: str, sample: Sample) -> str | None:
        # exact match is of the whole text; that it names a choice says that it can be read
        return None if parse_choice(text, sample.choices or closed) is None else normalise(text)

    def score(parsed: str | None, sample: Sample) -> dict[str, float]:
        return {"right": float(parsed == normalise(sample.answer))}

    return Task(
        name=name, documents=items, prompt=_itself, parse=parse, score=score, closed=tuple(closed), train=known,
        metrics={"accuracy": share_of("right")},
    )  # fmt: skip


def yes_no(name: str, items: Sequence[Sample], known: Sequence[Sample] = ()) -> Task:
    """Make a task of questions whose answers are yes and no."""

    def score(parsed: str | None, sample: Sample) -> dict[str, float]:
        return {"right": float(parsed == normalise(sample.answer)), "yes": float(parsed == "yes")}

    return Task(
        name=name, documents=items, prompt=_itself, parse=lambda text, sample: parse_yes_no(text), score=score,
        closed=("no", "yes"), train=known, metrics={"accuracy": share_of("right"), "yes ratio": share_of("yes")},
    )  # fmt: skip


def _forced_choice(name: str, items: list[Sample], known: list[Sample]) -> Task:
    return Task(
        name=name, documents=items, prompt=_itself, parse=as_it_is, rank=True, train=known, reads=False,
        score=lambda parsed, sample: {"right": float(parsed == sample.answer)},
        metrics={"forced choice": share_of("right")},
    )  # fmt: skip


def _captions(name: str, items: list[Sample], known: list[Sample]) -> Task:
    vocabulary = {
        normalise(n): n for s in (*known, *items) for n in s.truth.get("vocabulary", s.truth.get("objects", ()))
    }
    corpus = CiderD([s.references or (s.answer,) for s in items])

    def score(parsed: str | None, sample: Sample) -> dict[str, float]:
        text = parsed or ""
        counts = {"CIDEr-D": corpus.score(text, sample.references or (sample.answer,))}
        if vocabulary:
            found = chair([text], [set(sample.truth.get("objects", ()))], vocabulary)
            counts |= {
                "hallucinates": float(found.hallucinated_captions), "mentions": float(found.mentions),
                "hallucinated": float(found.hallucinated), "objects": float(found.objects),
                "recalled": float(found.recalled), "words": float(found.words),
            }  # fmt: skip
        return counts

    metrics: dict[str, Metric] = {"CIDEr-D": mean_of("CIDEr-D")}
    if vocabulary:
        metrics |= {
            "CHAIRs": share_of("hallucinates"), "CHAIRi": share_of("hallucinated", "mentions"),
            "object recall": share_of("recalled", "objects"), "words": mean_of("words"),
        }  # fmt: skip
    return Task(
        name=name, documents=items, prompt=_itself, parse=as_it_is, score=score, train=known, reads=False,
        metrics=metrics,
    )  # fmt: skip
