"""Answers of several models judged in pairs: both orders, disagreement is a tie, length is controlled for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from fastmllm.data.sample import Sample
from fastmllm.eval.answers import AnswerLog
from fastmllm.eval.bradley_terry import Game, sigmoid
from fastmllm.eval.intervals import Estimate, mean
from fastmllm.eval.judge import PAIRWISE, Judge, JudgeError, fill, parse_verdict, prompt_hash

RIDGE = 0.01  # on the weights of the length model: a twenty-fifth of an even observation


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One question, two models, two replies.

    Args:
        id: of the question.
        a, b: models.
        winner: a model; "" = tie; None = no verdict, since a reply is missing or is none.
        flipped: the two orders contradict each other, which makes a tie.
        replies: with a first, with b first; None = no reply.
        length_a, length_b: characters of the answers.
        judge, prompt: its name, and the hash of its prompt.
    """

    id: str
    a: str
    b: str
    winner: str | None
    flipped: bool
    replies: tuple[str | None, str | None]
    length_a: int
    length_b: int
    judge: str
    prompt: str


@dataclass(slots=True)
class Verdicts:
    """All judged pairs; questions that not every model answered are listed and not judged."""

    judged: list[Judged] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def unparsed(self) -> float:
        """Share of the pairs without a verdict."""
        return sum(j.winner is None for j in self.judged) / len(self.judged) if self.judged else 0.0

    @property
    def flipped(self) -> float:
        """Share of the verdicts that the order of the answers turned: what the judge's taste for places is."""
        decided = [j for j in self.judged if j.winner is not None]
        return sum(j.flipped for j in decided) / len(decided) if decided else 0.0

    def games(self) -> list[Game]:
        """Return the verdicts as games, for `bradley_terry.ratings`."""
        score = {"": 0.5}
        return [
            Game(j.a, j.b, score.get(j.winner, float(j.winner == j.a)), j.id)
            for j in self.judged
            if j.winner is not None
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judge_pairs(
    answers: Mapping[str, Mapping[str, str]],
    questions: Mapping[str, str],
    judge: Judge,
    name: str,
    *,
    references: Mapping[str, str] | None = None,
    template: str = PAIRWISE,
    log: AnswerLog | None = None,
) -> Verdicts:
    """Judge every pair of models on every question that all of them answered, in both orders.

    Args:
        answers: model -> question's id -> answer.
        questions: id -> the question.
        judge: prompt -> reply.
        name: of the judge, for the record.
        references: id -> what the image shows, for judges that see no images.
        template: with {question}, {reference}, {first}, {second}.
        log: where replies are kept; make it with block=1 and retry=True.

    Raises:
        ValueError: fewer than two models, or a template without these places.
    """
    if len(answers) < 2:
        raise ValueError(f"judge: {len(answers)} model(s); a pair needs two")
    log = log or AnswerLog(block=1)
    common = [i for i in questions if all(i in said for said in answers.values())]
    found = Verdicts(left_out=[i for i in questions if i not in set(common)])

    def prompts(first: str, second: str) -> list[Sample]:
        return [
            Sample(
                id=i, task="judge", answer="",
                prompt=fill(
                    template, question=questions[i], reference=(references or {}).get(i, "not given"),
                    first=answers[first][i], second=answers[second][i],
                ),
            )
            for i in common
        ]  # fmt: skip

    def ask(block: list[Sample]) -> list[str | Exception]:
        replies: list[str | Exception] = []
        for sample in block:
            try:
                replies.append(judge(sample.prompt))
            except JudgeError as error:
                replies.append(error)
        return replies

    for a, b in combinations(answers, 2):
        orders = [log.collect("judge", f"{x} before {y}", prompts(x, y), ask, name) for x, y in ((a, b), (b, a))]
        for i, one, other in zip(common, *orders, strict=True):
            winner, flipped = _settle(a, b, one, other)
            found.judged.append(
                Judged(
                    id=i, a=a, b=b, winner=winner, flipped=flipped, replies=(one, other), judge=name,
                    prompt=prompt_hash(template), length_a=len(answers[a][i]), length_b=len(answers[b][i]),
                )
            )  # fmt: skip
    found.failures = log.failures
    return found


def _settle(a: str, b: str, one: str | None, other: str | None) -> tuple[str | None, bool]:
    verdicts = [None if reply is None else parse_verdict(reply) for reply in (one, other)]
    if None in verdicts:
        return None, False
    first, second = ({"1": x, "2": y, "tie": ""}[v] for v, (x, y) in zip(verdicts, ((a, b), (b, a)), strict=True))  # type: ignore[index]
    return (first, False) if first == second else ("", bool(first and second))


def win_rate(judged: Sequence[Judged], model: str, against: str, seed: int = 0) -> Estimate:
    """Estimate how often a model wins, ties as half, with a bootstrap over questions."""
    points, _ = _points(judged, model, against)
    return mean(points, [j.id for j in _between(judged, model, against)], seed)


def length_controlled(judged: Sequence[Judged], model: str, against: str, seed: int = 0) -> Estimate:
    """Estimate how often a model would win if both answers were equally long.

    A logistic model of the points with one weight for tanh of the standardised difference of lengths (Dubois et al.,
    arXiv 2404.04475, without its term for the question), read where the difference is 0. A small ridge keeps a model
    that always wins finite; where the longer answer always won nothing is known of equal lengths, and the value lies
    between. Bootstrap over questions, 500 resamples.
    """
    points, lengths = _points(judged, model, against)
    ids = [j.id for j in _between(judged, model, against)]
    if not points:
        return Estimate(0.0, 0.0, 0.0, 0)
    y, spread = np.array(points), float(np.std(lengths)) or 1.0
    x = np.tanh(np.array(lengths) / spread)
    rng, draws = np.random.default_rng(seed), []
    places = {i: [k for k, other in enumerate(ids) if other == i] for i in dict.fromkeys(ids)}
    groups = list(places.values())
    for _ in range(500):
        rows = np.array([k for g in rng.integers(0, len(groups), len(groups)) for k in groups[g]])
        draws.append(_at_equal_length(x[rows], y[rows]))
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(_at_equal_length(x, y), float(low), float(high), len(y))


def _at_equal_length(x: np.ndarray, y: np.ndarray, steps: int = 25) -> float:
    design, weights = np.stack([np.ones_like(x), x], 1), np.zeros(2)
    for _ in range(steps):  # Newton; concave
        p = sigmoid(design @ weights)
        gradient = design.T @ (y - p) - RIDGE * weights
        hessian = (design * (p * (1 - p))[:, None]).T @ design + RIDGE * np.eye(2)
        weights = weights + np.linalg.solve(hessian, gradient)
    return float(sigmoid(weights[:1])[0])


def _between(judged: Sequence[Judged], model: str, against: str) -> list[Judged]:
    return [j for j in judged if {j.a, j.b} == {model, against} and j.winner is not None]


def _points(judged: Sequence[Judged], model: str, against: str) -> tuple[list[float], list[float]]:
    rows = _between(judged, model, against)
    points = [0.5 if j.winner == "" else float(j.winner == model) for j in rows]
    return points, [float((j.length_a - j.length_b) * (1 if j.a == model else -1)) for j in rows]
