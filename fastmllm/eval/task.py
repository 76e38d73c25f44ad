"""A task is four pure functions: document -> prompt -> parse -> score; metrics are made of the scores' sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmllm.data.sample import Sample
from fastmllm.eval.intervals import Estimate, mean, share, statistic


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer with what it counts for.

    Args:
        sample: the question, with the image that it is about (not the one that a control showed).
        parsed: what was read from the answer; None = nothing.
        counts: of `Task.score`.
        said: the text itself, for published scorers that read it otherwise; None = the question could not be asked.
    """

    sample: Sample
    parsed: Any
    counts: Mapping[str, float]
    said: str | None = None

    @property
    def cluster(self) -> str:
        """What goes together in an interval: what the truth names so, the image, else the question."""
        return str(self.sample.truth.get("cluster") or self.sample.image or self.sample.id)


Metric = Callable[[Sequence[Scored], int], Estimate]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is asked, and what an answer is worth.

    Args:
        name: of the rows.
        documents: any objects; `prompt` gives each an id of its own.
        prompt: document -> words, image, choices and truth of a question.
        parse: (generated text, question) -> what it says; None = it cannot be read.
        score: (parsed, question) -> what the answer adds to the sums; the first one is the answer's own value.
        metrics: name -> estimate of all answers; the first one is the task's.
        closed: answers that majority, random and blind draw from where a question has no choices; () = none: blind
            then writes freely.
        train: questions whose answers are the majority's; () = the task's own.
        rank: answer with the most probable choice instead of writing.
        max_new_tokens: of an answer; None = the configuration's.
        reads: whether `parse` can fail, so that its rows say how often.
    """

    name: str
    documents: Sequence[Any]
    prompt: Callable[[Any], Sample]
    parse: Callable[[str, Sample], Any]
    score: Callable[[Any, Sample], Mapping[str, float]]
    metrics: Mapping[str, Metric]
    closed: tuple[str, ...] = ()
    train: Sequence[Sample] = ()
    rank: bool = False
    max_new_tokens: int | None = None
    reads: bool = True

    def samples(self) -> list[Sample]:
        """Return all questions.

        Raises:
            ValueError: two of them have one id: answers are matched by it.
        """
        samples = [self.prompt(document) for document in self.documents]
        seen: set[str] = set()
        for sample in samples:
            if sample.id in seen:
                raise ValueError(f"task {self.name!r}: two questions have the id {sample.id!r}; ids must be unique")
            seen.add(sample.id)
        return samples

    def scored(self, texts: Sequence[str | None], samples: Sequence[Sample]) -> list[Scored]:
        """Parse and score answers; None, a question that could not be asked, parses as nothing."""
        parsed = [None if t is None else self.parse(t, s) for t, s in zip(texts, samples, strict=True)]
        return [Scored(s, p, self.score(p, s), t) for t, p, s in zip(texts, parsed, samples, strict=True)]


def as_it_is(text: str, sample: Sample) -> str:
    """Parse nothing: the text is the answer."""
    return text


def share_of(hit: str, total: str = "") -> Metric:
    """Return the share of a count: of the answers, or of another count (invented of mentioned objects)."""

    def metric(scored: Sequence[Scored], seed: int) -> Estimate:
        flags: list[bool] = []
        clusters: list[str] = []
        for item in scored:
            count = int(item.counts.get(total, 0.0)) if total else 1
            flags += [i < item.counts.get(hit, 0.0) for i in range(count)]
            clusters += [item.cluster] * count
        return share(flags, clusters)

    return metric


def mean_of(name: str) -> Metric:
    """Return the mean of a score over the answers."""
    return lambda scored, seed: mean([s.counts.get(name, 0.0) for s in scored], [s.cluster for s in scored], seed)


def of_sums(value_of: Callable[[Mapping[str, float]], float]) -> Metric:
    """Return a function of the counts' sums (F1, BLEU)."""
    return lambda scored, seed: statistic([s.counts for s in scored], value_of, [s.cluster for s in scored], seed)


def among(keep: Callable[[Sample], bool], metric: Metric) -> Metric:
    """Return a metric of some questions alone: a split, a dimension."""
    return lambda scored, seed: metric([item for item in scored if keep(item.sample)], seed)


def whole_groups(group_of: Callable[[Sample], str], hit: str = "right") -> Metric:
    """Return the share of groups of which every answer is right: fAcc, qAcc, circular choices."""

    def metric(scored: Sequence[Scored], seed: int) -> Estimate:
        right: dict[str, bool] = {}
        cluster: dict[str, str] = {}
        for item in scored:
            group = group_of(item.sample)
            right[group] = right.get(group, True) and item.counts.get(hit, 0.0) > 0
            cluster.setdefault(group, item.cluster)
        return share(list(right.values()), list(cluster.values()))

    return metric
