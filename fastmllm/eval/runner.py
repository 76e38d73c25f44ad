"""Run every task under every control and keep each answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np

from fastmllm.data.sample import Sample
from fastmllm.eval import controls
from fastmllm.eval.answers import AnswerLog
from fastmllm.eval.exact_truth import tasks_of
from fastmllm.eval.intervals import share
from fastmllm.eval.report import CONDITIONS, MODEL, Report, Row
from fastmllm.eval.similarity import ranks
from fastmllm.eval.task import Task

__all__ = ["CONDITIONS", "MODEL", "EvalConfig", "Report", "Responder", "Row", "evaluate", "evaluate_tasks"]


class Responder(Protocol):
    """A model that answers questions about images."""

    def answer(self, samples: Sequence[Sample], max_new_tokens: int) -> list[str]: ...

    def score(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Return the log-probability of each of a sample's choices."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """What is evaluated, and how much of it.

    Args:
        limit: at most this many questions a task, of images drawn by the seed; 0 = all.
        max_new_tokens: of a generated answer.
        gallery: images and names in the retrieval square; 0 leaves retrieval out.
        seed: of the wrong images and the random answers.
        sets: published sets beside the recipe's own questions, name -> folder in their authors' format: {pope: /data/
            pope}; `fastmllm.eval.sets` says which, and what a folder holds.
    """

    limit: int = 0
    max_new_tokens: int = 12
    gallery: int = 48
    seed: int = 0
    sets: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit < 0 or self.max_new_tokens < 1 or self.gallery < 0:
            raise ValueError("eval: limit and gallery must be >= 0, max_new_tokens >= 1")


def evaluate(
    responder: Responder,
    samples: Mapping[str, Sequence[Sample]],
    train: Mapping[str, Sequence[Sample]],
    config: EvalConfig,
    progress: Callable[[str, int, int], None] | None = None,
    log: AnswerLog | None = None,
    more: Sequence[Task] = (),
) -> Report:
    """Evaluate every task of `samples` under every control, and names against images where there are names.

    Args:
        responder: the model.
        samples, train: as `exact_truth.tasks_of`.
        config: limits and seeds.
        progress: called as (task, done, total) before each round of questions.
        log: where answers are kept.
        more: tasks of published sets.
    """
    kept = {t: controls.limited(s, config.limit, config.seed) for t, s in samples.items() if s}
    tasks = [*tasks_of(kept, train), *more]
    counted = _Counted(responder, progress, 3 * len(tasks) + 1)  # model, blind, wrong image; retrieval
    report = evaluate_tasks(counted, tasks, config, log, tick=counted.tick)
    names = kept.get("name")
    if names and config.gallery:
        counted.tick("retrieval")
        _retrieval(report, responder, names, config)
    return report


class _Counted:
    """Tell the progress before each round of questions."""

    def __init__(self, inner: Responder, progress: Callable[[str, int, int], None] | None, total: int) -> None:
        self.answer, self.score = inner.answer, inner.score
        self.progress, self.total, self.done = progress, total, 0

    def tick(self, task: str) -> None:
        if self.progress is not None:
            self.progress(task, self.done, self.total)
        self.done += 1


def evaluate_tasks(
    responder: Responder,
    tasks: Sequence[Task],
    config: EvalConfig,
    log: AnswerLog | None = None,
    tick: Callable[[str], None] = lambda task: None,
) -> Report:
    """Evaluate tasks under every control. Blind is the answer of the task's closed set that the model finds most
    probable without an image; what has no closed set it writes freely.

    Args:
        responder: the model.
        tasks: names must differ.
        config: limits and seeds.
        log: where answers are kept, and which of several ranks asks what.
        tick: called with the task before each round of questions.
    """  # fmt: skip
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"eval: two tasks have one name: {sorted(t.name for t in tasks)}")
    report, log = Report(), log or AnswerLog()
    for task in tasks:
        items = controls.limited(task.samples(), config.limit, config.seed)
        if not items:
            continue
        for condition, texts in _texts(responder, task, items, config, log, tick).items():
            scored = task.scored(texts, items)
            missing = sum(s.parsed is None for s in scored) / len(items) if task.reads else None
            report.rows += [
                Row(task.name, condition, m, f(scored, config.seed), missing) for m, f in task.metrics.items()
            ]
            for text, item in zip(texts, scored, strict=True):
                report.records.append(
                    {
                        "id": item.sample.id, "task": task.name, "condition": condition, "image": item.sample.image,
                        "prompt": item.sample.prompt, "answer": item.sample.answer, "said": text,
                        "parsed": item.parsed, "verdict": next(iter(item.counts.values())), "counts": item.counts,
                    }
                )  # fmt: skip
    report.failures = log.failures
    return report


def _texts(
    responder: Responder, task: Task, items: list[Sample], config: EvalConfig, log: AnswerLog,
    tick: Callable[[str], None],
) -> dict[str, list[str | None]]:  # fmt: skip
    """Return what is said under every condition."""
    texts: dict[str, list[str | None]] = {}
    length = task.max_new_tokens or config.max_new_tokens
    for condition, asked in (
        (MODEL, items),
        (controls.BLIND, controls.without_image(items)),
        (controls.WRONG, controls.with_wrong_image(items, config.seed)),
    ):
        if task.rank:
            ask, kind = partial(_choose, responder), "rank"
        elif condition == controls.BLIND and (task.closed or all(s.choices for s in items)):
            ask, kind = partial(_most_probable, responder, closed=task.closed), f"guess {task.closed}"
        else:
            ask, kind = partial(responder.answer, max_new_tokens=length), f"write {length}"
        tick(task.name)
        texts[condition] = log.collect(task.name, condition, asked, ask, kind)
    closed = task.closed or sorted({s.answer for s in task.train or items})
    texts[controls.MAJORITY] = [*controls.majority_answer(items, task.train, config.seed)]
    texts[controls.RANDOM] = [*controls.random_answer(items, closed, config.seed)]
    return texts


def _choose(responder: Responder, asked: Sequence[Sample]) -> list[str]:
    """Pick the most probable choice; a tie is no knowledge: the last one, which is never the right one, takes it."""
    return [
        s.choices[max(zip(row, range(len(row)), strict=True))[1]]
        for s, row in zip(asked, responder.score(asked), strict=True)
    ]


def _most_probable(responder: Responder, asked: Sequence[Sample], closed: Sequence[str]) -> list[str]:
    """Pick each question's answer from its choices or the closed set; equal questions are scored once.

    Left to itself a model that misses its image may say nothing, and would then lie below chance.
    """
    different = {(s.prompt, s.choices): replace(s, choices=tuple(sorted(s.choices or closed))) for s in asked}
    scores = dict(zip(different, responder.score(list(different.values())), strict=True))
    picks = {key: max(zip(scores[key], s.choices, strict=True))[1] for key, s in different.items()}
    return [picks[s.prompt, s.choices] for s in asked]


def _retrieval(report: Report, responder: Responder, items: list[Sample], config: EvalConfig) -> None:
    """Rank a square of images and names by log-probability, both ways (Flickr30k's protocol, small)."""
    unique = controls.limited(list({s.answer: s for s in items if s.image is not None}.values()), config.gallery)
    if len(unique) < 10:
        return
    names = tuple(s.answer for s in unique)
    scores = np.array(responder.score([replace(s, choices=names) for s in unique]))
    truths = [{i} for i in range(len(unique))]
    for direction, matrix in (("image to text", scores), ("text to image", scores.T)):
        places = ranks(matrix, truths)
        for k in (1, 5):
            metric = f"R@{k} {direction}"
            report.rows.append(Row("retrieval", MODEL, metric, share([p < k for p in places])))
            chance = share([i < k for i in range(len(unique))])
            report.rows.append(Row("retrieval", controls.RANDOM, metric, chance))
