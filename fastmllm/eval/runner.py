"""Run every task under every control and keep each answer: doc -> prompt -> parse -> score, as pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from rich.table import Table

from fastmllm.data.sample import Sample
from fastmllm.eval import controls
from fastmllm.eval.captions import chair, cider
from fastmllm.eval.intervals import Estimate, mean, share
from fastmllm.eval.parsing import normalise, parse_choice, parse_yes_no

MODEL = "model"
CAPTIONS = ("caption", "scene")
CONDITIONS = (MODEL, controls.BLIND, controls.WRONG, controls.MAJORITY, controls.RANDOM)


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
    """

    limit: int = 0
    max_new_tokens: int = 12
    gallery: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit < 0 or self.max_new_tokens < 1 or self.gallery < 0:
            raise ValueError("eval: limit and gallery must be >= 0, max_new_tokens >= 1")


@dataclass(frozen=True, slots=True)
class Row:
    """One score: a task, who answered, the metric, its value with a 95 % interval, and the share it could not parse."""

    task: str
    condition: str
    metric: str
    estimate: Estimate
    unparsed: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Report:
    """All rows, and a record for each answer."""

    rows: list[Row] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def get(self, task: str, condition: str = MODEL, metric: str | None = None) -> Row:
        """Return a row; the task's first metric unless one is named."""
        for row in self.rows:
            if (row.task, row.condition) == (task, condition) and metric in (None, row.metric):
                return row
        raise KeyError(f"no row {task} / {condition} / {metric}; tasks: {sorted({r.task for r in self.rows})}")

    def beats_controls(self, task: str) -> bool:
        """Tell whether the model's interval lies wholly above the intervals of all controls."""
        mine = self.get(task).estimate
        return all(mine.above(self.get(task, c).estimate) for c in CONDITIONS[1:])

    def to_json(self) -> list[dict[str, Any]]:
        return [r.to_json() for r in self.rows]

    def table(self) -> Table:
        """Return a rich table: a line a task and metric, a column a condition; unparsed shares in their order."""
        table = Table(title="Evaluation: % and 95 % interval (CIDEr-D is a score; less CHAIR is better)")
        for name in ("task", "metric", "n", *CONDITIONS, "unparsed, %"):
            table.add_column(name, justify="left" if name in ("task", "metric") else "right")
        for task, metric in dict.fromkeys((r.task, r.metric) for r in self.rows):
            cells = {r.condition: r for r in self.rows if (r.task, r.metric) == (task, metric)}
            mine = cells[MODEL]
            table.add_row(
                task,
                metric,
                str(mine.estimate.count),
                *(_cell(cells[c].estimate, metric) if c in cells else "-" for c in CONDITIONS),
                unparsed(cells) or "-",
            )
        return table


def unparsed(row: Mapping[str, Row]) -> str:
    """Return the unparsed shares of a line of the table, in the order of `CONDITIONS`: "3 / 0 / 1 / 0 / 0"."""
    shares = [row[c].unparsed for c in CONDITIONS if c in row]
    return (
        " / ".join("-" if s is None else f"{100 * s:.0f}" for s in shares) if any(s is not None for s in shares) else ""
    )


def _cell(e: Estimate, metric: str) -> str:
    if metric == "CIDEr-D":
        return f"{e.value:.1f} {e.low:.1f}-{e.high:.1f}"
    return f"{100 * e.value:.0f} {100 * e.low:.0f}-{100 * e.high:.0f}"


def evaluate(
    responder: Responder,
    samples: Mapping[str, Sequence[Sample]],
    train: Mapping[str, Sequence[Sample]],
    config: EvalConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Evaluate every task of `samples` under every control.

    Args:
        responder: the model.
        samples: task -> held-out questions. `exists` is forced choice by log-probability; `caption` and `scene`
            are scored by CIDEr-D and CHAIR; yes/no answers are parsed strictly; the rest is exact match. Blind is
            the task's answer that the model finds most probable without an image; captions it writes freely.
        train: task -> training questions, for the majority answer and the closed sets.
        config: limits and seeds.
        progress: called as (task, done, total) before each round of questions.
    """
    report = Report()
    tasks = {t: controls.limited(s, config.limit, config.seed) for t, s in samples.items() if s}
    responder = _Counted(responder, progress, 3 * len(tasks) + 1)  # model, blind, wrong image; retrieval
    for task, items in tasks.items():
        known = list(train.get(task, ()))
        if task == "exists":
            _forced_choice(report, responder, items, known, config)
        elif task in CAPTIONS:
            _captions(report, task, responder, items, known, config)
        else:
            _exact_match(report, task, responder, items, known, config)
    names = tasks.get("name")
    if names and config.gallery:
        _retrieval(report, responder, names, config)
    return report


class _Counted:
    """Tell the progress before each round of questions."""

    def __init__(self, inner: Responder, progress: Callable[[str, int, int], None] | None, total: int) -> None:
        self.inner, self.progress, self.total, self.done = inner, progress, total, 0

    def answer(self, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
        self._tick(samples)
        return self.inner.answer(samples, max_new_tokens)

    def score(self, samples: Sequence[Sample]) -> list[list[float]]:
        self._tick(samples)
        return self.inner.score(samples)

    def _tick(self, samples: Sequence[Sample]) -> None:
        if self.progress is not None:
            self.progress(samples[0].task, self.done, self.total)
        self.done += 1


def _variants(items: list[Sample], config: EvalConfig) -> dict[str, list[Sample]]:
    return {
        MODEL: items,
        controls.BLIND: controls.without_image(items),
        controls.WRONG: controls.with_wrong_image(items, config.seed),
    }


def _answers(
    responder: Responder,
    items: list[Sample],
    known: list[Sample],
    closed: Sequence[str],
    config: EvalConfig,
    guess: bool = False,
) -> dict[str, list[str]]:
    """Answer under every condition; with `guess`, blind picks from the closed set instead of writing freely."""
    texts = {}
    for condition, asked in _variants(items, config).items():
        if guess and condition == controls.BLIND:
            texts[condition] = _most_probable(responder, asked, closed)
        else:
            texts[condition] = responder.answer(asked, config.max_new_tokens)
    texts[controls.MAJORITY] = controls.majority_answer(items, known, config.seed)
    texts[controls.RANDOM] = controls.random_answer(items, closed, config.seed)
    return texts


def _most_probable(responder: Responder, asked: Sequence[Sample], closed: Sequence[str]) -> list[str]:
    """Pick each question's answer from its choices or the closed set; equal questions are scored once.

    Left to itself a model that misses its image may say nothing, and would then lie below chance.
    """
    different = {(s.prompt, s.choices): replace(s, choices=tuple(sorted(s.choices or closed))) for s in asked}
    scores = dict(zip(different, responder.score(list(different.values())), strict=True))
    picks = {key: max(zip(scores[key], s.choices, strict=True))[1] for key, s in different.items()}
    return [picks[s.prompt, s.choices] for s in asked]


def _exact_match(
    report: Report, task: str, responder: Responder, items: list[Sample], known: list[Sample], config: EvalConfig
) -> None:
    closed = sorted({s.answer for s in (*known, *items)} | {c for s in items for c in s.choices})
    verdicts = {normalise(c) for c in closed} <= {"yes", "no"}
    for condition, texts in _answers(responder, items, known, closed, config, guess=True).items():
        parsed = [
            parse_yes_no(t) if verdicts else parse_choice(t, s.choices or closed)
            for t, s in zip(texts, items, strict=True)
        ]
        # exact match is of the generated text; a verdict may carry more words
        said = [p or "" for p in parsed] if verdicts else texts
        correct = [normalise(t) == normalise(s.answer) for t, s in zip(said, items, strict=True)]
        missing = sum(p is None for p in parsed) / len(items)
        report.rows.append(Row(task, condition, "accuracy", share(correct, [s.image for s in items]), missing))
        if verdicts:
            yes = [p == "yes" for p in parsed]
            report.rows.append(Row(task, condition, "yes ratio", share(yes, [s.image for s in items]), missing))
        _record(report, task, condition, items, texts, correct)


def _forced_choice(
    report: Report, responder: Responder, items: list[Sample], known: list[Sample], config: EvalConfig
) -> None:
    picks = {}
    for condition, asked in _variants(items, config).items():
        scores = responder.score(asked)
        picks[condition] = [
            # a tie is no knowledge: the last choice, which is never the right one, takes it
            s.choices[max(zip(row, range(len(row)), strict=True))[1]]
            for s, row in zip(asked, scores, strict=True)
        ]
    picks[controls.MAJORITY] = controls.majority_answer(items, known, config.seed)
    picks[controls.RANDOM] = controls.random_answer(items, (), config.seed)
    for condition, chosen in picks.items():
        correct = [c == s.answer for c, s in zip(chosen, items, strict=True)]
        report.rows.append(Row("exists", condition, "forced choice", share(correct, [s.image for s in items])))
        _record(report, "exists", condition, items, chosen, correct)


def _captions(
    report: Report, task: str, responder: Responder, items: list[Sample], known: list[Sample], config: EvalConfig
) -> None:
    closed = sorted({s.answer for s in known}) or sorted({s.answer for s in items})
    truths = [set(s.truth.get("objects", ())) for s in items]
    vocabulary = {normalise(n): n for s in (*known, *items) for n in s.truth.get("objects", ())}
    references = [s.references or (s.answer,) for s in items]
    for condition, texts in _answers(responder, items, known, closed, config).items():
        scores = cider(texts, references)
        report.rows.append(Row(task, condition, "CIDEr-D", mean(scores, [s.image for s in items], config.seed)))
        if vocabulary:
            each = [chair([t], [truth], vocabulary) for t, truth in zip(texts, truths, strict=True)]
            images = [s.image for s in items]
            sentences = [c.hallucinated_captions > 0 for c in each]
            report.rows.append(Row(task, condition, "CHAIRs", share(sentences, images)))
            # mentions and objects of one image go together
            for metric, hits, totals in (
                ("CHAIRi", [c.hallucinated for c in each], [c.mentions for c in each]),
                ("object recall", [c.recalled for c in each], [c.objects for c in each]),
            ):
                flags = [i < hit for hit, total in zip(hits, totals, strict=True) for i in range(total)]
                clusters = [image for image, total in zip(images, totals, strict=True) for _ in range(total)]
                report.rows.append(Row(task, condition, metric, share(flags, clusters)))
        _record(report, task, condition, items, texts, scores)


def _retrieval(report: Report, responder: Responder, items: list[Sample], config: EvalConfig) -> None:
    """Rank a square of images and names by log-probability, both ways (Flickr30k's protocol, small)."""
    unique = controls.limited(list({s.answer: s for s in items if s.image is not None}.values()), config.gallery)
    if len(unique) < 10:
        return
    names = tuple(s.answer for s in unique)
    scores = responder.score([replace(s, choices=names) for s in unique])
    for direction, matrix in (("image to text", scores), ("text to image", list(zip(*scores, strict=True)))):
        ranks = [sum(x > row[i] for x in row) + sum(x == row[i] for x in row[:i]) for i, row in enumerate(matrix)]
        for k in (1, 5):
            metric = f"R@{k} {direction}"
            report.rows.append(Row("retrieval", MODEL, metric, share([r < k for r in ranks])))
            chance = share([i < k for i in range(len(unique))])
            report.rows.append(Row("retrieval", controls.RANDOM, metric, chance))


def _record(
    report: Report, task: str, condition: str, items: Sequence[Sample], texts: Sequence[str], verdicts: Sequence[Any]
) -> None:
    for sample, text, verdict in zip(items, texts, verdicts, strict=True):
        report.records.append(
            {
                "id": sample.id,
                "task": task,
                "condition": condition,
                "answer": sample.answer,
                "said": text,
                "verdict": verdict,
            }
        )
