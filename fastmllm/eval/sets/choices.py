"""ScienceQA in its authors' format: lettered choices, by letter or text, rotated, or ranked by log-probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastmllm.data.sample import Sample
from fastmllm.eval.intervals import Estimate, share
from fastmllm.eval.parsing import parse_choice
from fastmllm.eval.sets.reading import Loaded, Reader, RowError, text_of
from fastmllm.eval.task import Metric, Scored, Task, as_it_is, share_of, whole_groups

LAYOUT = (
    "problems.json, pid_splits.json (github.com/lupantech/ScienceQA, data/scienceqa) and its images in "
    "test/<id>/image.png"
)
LETTER = "\nAnswer with the option's letter from the given choices directly."  # LLaVA's
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


def lettered(question: str, choices: Sequence[str], hint: str = "") -> str:
    """Return a prompt that calls its choices A, B, C, …"""
    options = "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))
    return f"{f'Context: {hint}{chr(10)}' if hint else ''}{question}\n{options}{LETTER}"


def rotations(sample: Sample, question: str, hint: str = "") -> list[Sample]:
    """Return a question once for each rotation of its choices (VLMEvalKit's CircularEval)."""
    turned = [sample.choices[k:] + sample.choices[:k] for k in range(len(sample.choices))]
    return [
        replace(sample, id=f"{sample.id}/{k}", prompt=lettered(question, choices, hint), choices=choices)
        for k, choices in enumerate(turned)
    ]


def load_science_qa(folder: str | Path, images: bool = True) -> Loaded:
    """Load ScienceQA's test split as three tasks: written letters, the same for every rotation, ranked choices.

    Half of the questions have no image: "accuracy, IMG" is of those that have one.

    Raises:
        SetError: a file is missing, or is not what it should be.
    """
    reader = Reader("scienceqa", folder, LAYOUT, images)
    problems = reader.json(reader.file("problems.json"), dict)
    chosen = reader.json(reader.file("pid_splits.json"), dict).get("test", [])
    rows = ((f"problems.json, {name}", (name, problems.get(name))) for name in chosen)
    samples = reader.samples(rows, partial(_sample, reader))
    reader.expect("questions", len(samples), 4241)
    metrics: dict[str, Metric] = {"accuracy": share_of("right")}
    for name in ("IMG", "TXT", "NO", *SUBJECTS.values(), "G1-6", "G7-12"):
        metrics[f"accuracy, {name}"] = share_of(f"right {name}", name)
    own = dict(metrics)
    metrics |= {f"accuracy, {c}": partial(_published, c) for c in ("llava", "lmms-eval", "vlmevalkit")}  # type: ignore[misc]
    turned = [r for s in samples for r in rotations(s, s.truth["question"], s.truth["hint"])]
    reader.loaded.tasks = [
        _task("scienceqa", samples, metrics),
        _task("scienceqa, circular", turned, {"all rotations": whole_groups(lambda s: s.id.rpartition("/")[0])}),
        replace(_task("scienceqa, ranked", samples, own), rank=True, parse=as_it_is, reads=False),
    ]
    return reader.loaded


def _task(name: str, samples: list[Sample], metrics: Mapping[str, Metric]) -> Task:
    def parse(text: str, sample: Sample) -> str | None:
        return parse_choice(text, sample.choices, letters=True)

    return Task(
        name=name, documents=samples, prompt=lambda sample: sample, parse=parse, score=_score, metrics=metrics
    )  # fmt: skip


def _sample(reader: Reader, row: tuple[str, Any]) -> Sample:
    name, problem = row
    if not isinstance(problem, dict):
        raise RowError("no problem of this id")
    choices = tuple(problem["choices"])
    if not 2 <= len(choices) <= 26 or not all(isinstance(c, str) for c in choices):
        raise RowError("choices are not 2 to 26 texts")
    if not isinstance(problem["answer"], int) or not 0 <= problem["answer"] < len(choices):
        raise RowError("answer out of range")
    question, hint, image = text_of(problem, "question"), problem.get("hint") or "", problem.get("image")
    grade = int(str(problem.get("grade", "grade0")).removeprefix("grade"))
    groups = [SUBJECTS[problem["subject"]], "G1-6" if grade <= 6 else "G7-12"]
    groups += ["IMG"] if image else []
    groups += ["TXT"] if hint else []
    groups += [] if image or hint else ["NO"]
    return Sample(
        id=name, prompt=lettered(question, choices, hint), answer=choices[problem["answer"]], choices=choices,
        task="scienceqa", image=reader.image(f"test/{name}/{image}", f"images/test/{name}/{image}") if image else None,
        truth={"groups": groups, "question": question, "hint": hint, "cluster": name},
    )  # fmt: skip


def _score(parsed: str | None, sample: Sample) -> dict[str, float]:
    right = float(parsed == sample.answer)
    counts = {"right": right}
    for group in sample.truth["groups"]:
        counts |= {group: 1.0, f"right {group}": right}
    return counts


def _published(compat, scored: Sequence[Scored], seed: int) -> Estimate:
    right = [parse_choice(s.said or "", s.sample.choices, compat=compat) == s.sample.answer for s in scored]
    return share(right, [s.cluster for s in scored])
