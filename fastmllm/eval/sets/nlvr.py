"""NLVR in the format of lil-lab/nlvr: a sentence that is true or false of six layouts of the same objects."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fastmllm.data.sample import Sample
from fastmllm.eval.parsing import parse_yes_no
from fastmllm.eval.sets.reading import Loaded, Reader, one_of, text_of
from fastmllm.eval.task import Task, share_of, whole_groups

LAYOUT = "dev.json and images/ (github.com/lil-lab/nlvr, nlvr/dev; unpack an archive of the images: tar xf …)"
VERDICTS = {"true": "yes", "false": "no"}


def load_nlvr(folder: str | Path, images: bool = True) -> Loaded:
    """Load NLVR's dev split: accuracy, and consistency, the share of sentences right for all their scenes and layouts.

    Up to four scenes share a sentence, and 246 of 267 sentences are true of one and false of another: no answer from
    the words alone is consistent there.

    Raises:
        SetError: a file is missing.
    """
    reader = Reader("nlvr", folder, LAYOUT, images)
    samples = reader.samples(reader.lines(reader.file("dev.json")), partial(_samples, reader))
    reader.expect("pairs of a sentence and an image", len(samples), 5934)
    reader.loaded.tasks = [
        Task(
            name="nlvr", documents=samples, prompt=lambda sample: sample, closed=("false", "true"),
            parse=lambda text, sample: parse_yes_no(text),
            score=lambda parsed, sample: {
                "right": float(parsed == VERDICTS[sample.answer]), "yes": float(parsed == "yes")
            },
            metrics={
                "accuracy": share_of("right"), "consistency": whole_groups(lambda s: s.truth["cluster"]),
                "yes ratio": share_of("yes"),
            },
        )
    ]  # fmt: skip
    return reader.loaded


def _samples(reader: Reader, row: Mapping) -> list[Sample]:
    label = one_of(row["label"], tuple(VERDICTS), "label is neither true nor false")
    name, sentence = text_of(row, "identifier"), text_of(row, "sentence")
    return [
        Sample(
            id=f"{name}/{k}", answer=label, task="nlvr", truth={"cluster": name.partition("-")[0]},
            prompt=f"{sentence}\nIs this true of the image? Answer true or false.",
            image=reader.image(f"images/{row['directory']}/dev-{name}-{k}.png"),
        )
        for k in range(6)
    ]  # fmt: skip
