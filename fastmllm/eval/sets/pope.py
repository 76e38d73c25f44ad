"""POPE in the format of RUCAIBox/POPE: yes/no questions about objects, three ways of choosing the absent ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from fastmllm.data.sample import Sample
from fastmllm.eval.intervals import Estimate, statistic
from fastmllm.eval.parsing import parse_yes_no
from fastmllm.eval.sets.reading import WORD, Loaded, Reader, one_of, text_of
from fastmllm.eval.task import Metric, Scored, Task, among, of_sums
from fastmllm.eval.yes_no import confusion, mean_over_splits, scores_of

SPLITS = ("random", "popular", "adversarial")
LAYOUT = (
    "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json (github.com/RUCAIBox/POPE, output/coco) "
    "and the images of COCO's val2014 in val2014/"
)


def load_pope(folder: str | Path, images: bool = True) -> Loaded:
    """Load POPE: one task, with each split's scores, their means, and what three published scorers make of it.

    Raises:
        SetError: a file is missing.
    """
    reader = Reader("pope", folder, LAYOUT, images)
    samples: list[Sample] = []
    for split in SPLITS:
        path = reader.file(f"coco_pope_{split}.json")
        found = reader.samples(reader.lines(path), partial(_sample, reader, split))
        reader.expect(f"questions in {path.name}", len(found), 3000)
        samples += found
    metrics: dict[str, Metric] = {"F1, mean of splits": _mean("F1"), "accuracy, mean of splits": _mean("accuracy")}
    for split in SPLITS:
        for score in ("accuracy", "precision", "recall", "F1", "yes ratio"):
            metrics[f"{score}, {split}"] = _of(split, score)
    for compat in ("pope", "lmms-eval", "vlmevalkit"):
        metrics[f"F1, mean of splits, {compat}"] = partial(_published, compat)  # type: ignore[assignment]
    reader.loaded.tasks = [
        Task(
            name="pope", documents=samples, prompt=lambda sample: sample, closed=("no", "yes"), metrics=metrics,
            parse=lambda text, sample: parse_yes_no(text), score=_score,
        )
    ]  # fmt: skip
    return reader.loaded


def _sample(reader: Reader, split: str, row: Mapping) -> Sample:
    label = one_of(row["label"], ("yes", "no"), "label is neither yes nor no")
    image = text_of(row, "image")
    return Sample(
        id=f"{split}/{row['question_id']}", prompt=text_of(row, "text") + WORD, answer=label, task="pope", source=split,
        image=reader.image(f"val2014/{image}", f"images/{image}", image),
    )  # fmt: skip


def _score(parsed: str | None, sample: Sample) -> dict[str, float]:
    cells = confusion(parsed, sample.answer)  # type: ignore[arg-type]
    return {"right": float(parsed == sample.answer)} | {f"{sample.source}: {c}": n for c, n in cells.items()}


def _cells(sums: Mapping[str, float], split: str) -> dict[str, float]:
    return {name.partition(": ")[2]: n for name, n in sums.items() if name.startswith(f"{split}: ")}


def _of(split: str, score: str) -> Metric:
    return among(lambda s: s.source == split, of_sums(lambda sums: scores_of(_cells(sums, split))[score]))


def _mean(score: str) -> Metric:
    return of_sums(lambda sums: mean_over_splits({s: scores_of(_cells(sums, s)) for s in SPLITS})[score])


def _published(compat, scored: Sequence[Scored], seed: int) -> Estimate:
    """Read and score the same answers as a published scorer does; 0 to 1."""
    counts = []
    for item in scored:
        cells = confusion(parse_yes_no(item.said or "", compat), item.sample.answer)
        counts.append({f"{item.sample.source}: {c}": n for c, n in cells.items()})
    scale = 0.01 if compat == "vlmevalkit" else 1.0

    def value(sums: Mapping[str, float]) -> float:
        return scale * mean_over_splits({s: scores_of(_cells(sums, s), compat) for s in SPLITS})["F1"]

    return statistic(counts, value, [item.cluster for item in scored], seed)
