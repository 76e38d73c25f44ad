"""Sets of short answers in their authors' formats: easy-VQA, GQA, VQAv2, TextVQA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastmllm.data.sample import Sample
from fastmllm.data.text import normalise
from fastmllm.eval.intervals import Estimate, mean
from fastmllm.eval.parsing import parse_choice
from fastmllm.eval.sets.reading import WORD, Loaded, Reader, RowError, text_of
from fastmllm.eval.task import Metric, Scored, Task, as_it_is, mean_of, of_sums, share_of
from fastmllm.eval.vqa import vqa_accuracy

EASY_LAYOUT = "test/questions.json, answers.txt and test/images/<id>.png (the package easy-vqa, easy_vqa/data)"
GQA_LAYOUT = "testdev_balanced_questions.json and images/<id>.jpg (cs.stanford.edu/people/dorarad/gqa)"
VQA_LAYOUT = (
    "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json (visualqa.org) and the images of "
    "COCO's val2014 in val2014/"
)
TEXT_LAYOUT = "TextVQA_0.5.1_val.json and train_images/<id>.jpg (textvqa.org)"
KINDS = ("yes/no", "number", "other")


def load_easy_vqa(folder: str | Path, images: bool = True) -> Loaded:
    """Load easy-VQA's test split: exact match in a closed set of 13 answers.

    Raises:
        SetError: a file is missing, or is not what it should be.
    """
    reader = Reader("easy-vqa", folder, EASY_LAYOUT, images)
    closed = tuple(sorted(reader.file("answers.txt").read_text(encoding="utf-8").split()))
    rows = enumerate(reader.json(reader.file("test/questions.json"), list))

    def make(row: tuple[int, Any]) -> Sample:
        place, (question, answer, image) = row
        if answer not in closed:
            raise RowError("answer out of range")
        return Sample(
            id=str(place), prompt=text_of({"question": question}, "question") + WORD, answer=answer, task="easy-vqa",
            image=reader.image(f"test/images/{image}.png"),
        )  # fmt: skip

    samples = reader.samples(((f"questions.json, row {row[0]}", row) for row in rows), make)
    reader.expect("questions", len(samples), 9673)
    reader.loaded.tasks = [
        Task(
            name="easy-vqa", documents=samples, prompt=lambda sample: sample, closed=closed,
            parse=lambda text, sample: parse_choice(text, closed), metrics={"accuracy": share_of("right")},
            score=lambda parsed, sample: {"right": float(parsed == sample.answer)},
        )
    ]  # fmt: skip
    return reader.loaded


def load_gqa(folder: str | Path, images: bool = True) -> Loaded:
    """Load GQA's balanced testdev split: exact match of the folded answer.

    Raises:
        SetError: a file is missing, or is not what it should be.
    """
    reader = Reader("gqa", folder, GQA_LAYOUT, images)
    rows = reader.json(reader.file("testdev_balanced_questions.json"), dict)

    def make(row: tuple[str, Any]) -> Sample:
        name, q = row
        return Sample(
            id=name, prompt=text_of(q, "question") + WORD, answer=text_of(q, "answer"), task="gqa",
            image=reader.image(f"images/{text_of(q, 'imageId')}.jpg"),
        )  # fmt: skip

    samples = reader.samples(((f"question {row[0]}", row) for row in rows.items()), make)
    reader.expect("questions", len(samples), 12578)
    reader.loaded.tasks = [
        Task(
            name="gqa", documents=samples, prompt=lambda sample: sample, reads=False,
            parse=lambda text, sample: normalise(text), metrics={"accuracy": share_of("right")},
            score=lambda parsed, sample: {"right": float(parsed == normalise(sample.answer))},
        )
    ]  # fmt: skip
    return reader.loaded


def load_vqav2(folder: str | Path, images: bool = True) -> Loaded:
    """Load VQAv2's val2014: VQA accuracy, in all and by kind of answer, ours and the official script's.

    Raises:
        SetError: a file is missing, or is not what it should be.
    """
    reader = Reader("vqav2", folder, VQA_LAYOUT, images)
    truth = reader.json(reader.file("v2_mscoco_val2014_annotations.json"), dict).get("annotations", [])
    asked = reader.json(reader.file("v2_OpenEnded_mscoco_val2014_questions.json"), dict).get("questions", [])
    by_id = {a.get("question_id"): a for a in truth if isinstance(a, dict)}

    def make(row: Mapping) -> Sample:
        if (note := by_id.get(row["question_id"])) is None:
            raise RowError("no annotation of this id")
        image = f"val2014/COCO_val2014_{int(row['image_id']):012d}.jpg"
        return _annotated(
            row, [a["answer"] for a in note["answers"]], "vqav2", reader.image(image), note["answer_type"]
        )

    samples = reader.samples(((f"questions, row {i}", row) for i, row in enumerate(asked)), make)
    reader.expect("questions", len(samples), 214354)
    metrics: dict[str, Metric] = {f"accuracy, {kind}": _of_kind(kind) for kind in KINDS}
    reader.loaded.tasks = [_vqa_task("vqav2", samples, metrics)]
    return reader.loaded


def load_textvqa(folder: str | Path, images: bool = True) -> Loaded:
    """Load TextVQA's val split: VQA accuracy.

    Raises:
        SetError: a file is missing, or is not what it should be.
    """
    reader = Reader("textvqa", folder, TEXT_LAYOUT, images)
    rows = reader.json(reader.file("TextVQA_0.5.1_val.json"), dict).get("data", [])

    def make(row: Mapping) -> Sample:
        image = reader.image(f"train_images/{text_of(row, 'image_id')}.jpg")
        return _annotated(row, row["answers"], "textvqa", image, "other")

    samples = reader.samples(((f"data, row {i}", row) for i, row in enumerate(rows)), make)
    reader.expect("questions", len(samples), 5000)
    reader.loaded.tasks = [_vqa_task("textvqa", samples, {})]
    return reader.loaded


def _annotated(row: Mapping, answers: Sequence[str], task: str, image: str, kind: str) -> Sample:
    if not answers or not all(isinstance(a, str) for a in answers):
        raise RowError("answers are no texts")
    return Sample(
        id=str(row["question_id"]), prompt=text_of(row, "question") + WORD, task=task, image=image, source=kind,
        answer=Counter(sorted(answers)).most_common(1)[0][0], references=tuple(answers),
    )  # fmt: skip


def _vqa_task(name: str, samples: list[Sample], metrics: Mapping[str, Metric]) -> Task:
    def score(parsed: str | None, sample: Sample) -> dict[str, float]:
        accuracy = vqa_accuracy(parsed or "", sample.references)
        return {"accuracy": accuracy, f"n {sample.source}": 1.0, f"sum {sample.source}": accuracy}

    return Task(
        name=name, documents=samples, prompt=lambda sample: sample, parse=as_it_is, score=score, reads=False,
        metrics={"accuracy": mean_of("accuracy"), **metrics, "accuracy, official script": partial(_published)},
    )  # fmt: skip


def _of_kind(kind: str) -> Metric:
    return of_sums(lambda s: s.get(f"sum {kind}", 0.0) / s[f"n {kind}"] if s.get(f"n {kind}") else 0.0)


def _published(scored: Sequence[Scored], seed: int) -> Estimate:
    values = [vqa_accuracy(s.said or "", s.sample.references, compat="vqa") for s in scored]
    return mean(values, [s.cluster for s in scored], seed)
