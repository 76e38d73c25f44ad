"""Pairs of a right and a wrong answer, made from the questions that the data has, and batches of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from fastmllm.data.augment import rng_of
from fastmllm.data.images import ImageError, open_image, save_png
from fastmllm.data.packing import Batch
from fastmllm.data.sample import Sample
from fastmllm.data.text import normalise

VERSION = 1  # raise it when the crop changes, so that cached files are not mistaken for the new ones
LARGEST_CROP = 0.2  # share of the area that a corrupted image keeps at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One question with an answer to prefer and one to avoid.

    Args:
        chosen, rejected: samples that differ in their answer (and id) only.
        corrupted: the chosen one beside an image that does not show what it says; None without an image.
    """

    chosen: Sample
    rejected: Sample
    corrupted: Sample | None = None

    def __post_init__(self) -> None:
        if (self.chosen.prompt, self.chosen.image) != (self.rejected.prompt, self.rejected.image):
            raise ValueError(f"pair {self.chosen.id!r}: both answers must be to one prompt about one image")
        if self.chosen.answer == self.rejected.answer:
            raise ValueError(f"pair {self.chosen.id!r}: both answers are {self.chosen.answer!r}; leave it out")

    @property
    def samples(self) -> list[Sample]:
        """Chosen, rejected, and corrupted if there is one."""
        return [self.chosen, self.rejected, *([] if self.corrupted is None else [self.corrupted])]


@dataclass(slots=True)
class PairBatch:
    """P pairs in one packed batch, in which each image stands once.

    Args:
        batch: all sequences, S.
        chosen, rejected: (P,) int64, the sequence of each pair.
        corrupted: (C,) int64, the sequences beside corrupted images.
        corrupted_pair: (C,) int64, the pair of each.
        reference: (S,) fp32 log-probabilities of all sequences under the reference.
    """

    batch: Batch
    chosen: torch.Tensor
    rejected: torch.Tensor
    corrupted: torch.Tensor
    corrupted_pair: torch.Tensor
    reference: torch.Tensor

    @property
    def input_ids(self) -> torch.Tensor:
        """(T,) of the packed batch."""
        return self.batch.input_ids

    @property
    def num_targets(self) -> int:
        """P: a step's loss is the mean over its pairs."""
        return len(self.chosen)

    @property
    def ids(self) -> list[str]:
        """Names of the sequences."""
        return self.batch.ids


def pairs_of(
    tasks: Mapping[str, Sequence[Sample]], folder: Path | None, *, seed: int = 0
) -> tuple[dict[str, list[Pair]], dict[str, list[str]]]:
    """Set a wrong answer of the closed set beside every right one.

    The wrong answer is another of the sample's choices; without choices, an answer to the same prompt elsewhere, one
    about the same group of things if there is one. The corrupted image is a crop of at most 20 % of the area, as mDPO's
    (arXiv 2406.11839), in a file of its own.

    Args:
        tasks: task -> samples.
        folder: for the corrupted images; None makes none.
        seed: of wrong answers and crops.

    Returns:
        Task -> pairs, and reason -> ids of the samples that make none.
    """
    pairs: dict[str, list[Pair]] = {}
    skipped: dict[str, list[str]] = {}
    for task, samples in tasks.items():
        closed = _closed_sets(samples)
        for sample in samples:
            wrong = _wrong(sample, closed.get(sample.prompt, {}), seed)
            if wrong is None:
                skipped.setdefault("no wrong answer in a closed set", []).append(sample.id)
                continue
            try:
                corrupted = None
                if sample.image is not None and folder is not None:
                    path = corrupted_image(sample.image, folder, seed=seed)
                    corrupted = replace(sample, id=f"{sample.id}/corrupted", image=str(path))
            except ImageError:
                skipped.setdefault("image that cannot be read", []).append(sample.id)
                continue
            rejected = replace(sample, id=f"{sample.id}/rejected", answer=wrong)
            pairs.setdefault(task, []).append(Pair(chosen=sample, rejected=rejected, corrupted=corrupted))
    return pairs, skipped


def _closed_sets(samples: Iterable[Sample]) -> dict[str, dict[str, set[str]]]:
    """Return prompt -> answer -> groups of the things that it is given about."""
    closed: dict[str, dict[str, set[str]]] = {}
    for sample in samples:
        groups = closed.setdefault(sample.prompt, {}).setdefault(sample.answer, set())
        groups.add(str(sample.truth.get("group", "")))
    return closed


def _wrong(sample: Sample, answers: Mapping[str, set[str]], seed: int) -> str | None:
    """Choose a wrong answer, or return None where there is none."""
    right = {normalise(text) for text in (sample.answer, *sample.references)}
    options = [text for text in sample.choices or sorted(answers) if normalise(text) not in right]
    if not sample.choices and (group := sample.truth.get("group")):
        options = [text for text in options if str(group) in answers[text]] or options
    return options[int(rng_of("wrong", seed, sample.id).integers(len(options)))] if options else None


def corrupted_image(path: str, folder: Path, *, seed: int = 0) -> Path:
    """Return a crop of at most a fifth of an image's area, in its size, writing the file if it is not there yet.

    Args:
        path: the image; the crop's name holds the hash of its content, so that a changed one has another crop.
        folder: where it goes.
        seed: which crop.

    Raises:
        ImageError: the image cannot be read.
    """
    try:
        content = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:24]
    except OSError as error:
        raise ImageError(f"{path}: not readable ({error.strerror}); restore or leave it out") from error
    target = folder / f"{content}-c{VERSION}-s{seed}.png"
    if not target.exists():
        image = open_image(path)
        generator = rng_of("crop", VERSION, seed, content)
        side = math.sqrt(generator.uniform(0.0, LARGEST_CROP))
        width, height = max(1, round(image.width * side)), max(1, round(image.height * side))
        left, top = (int(generator.integers(0, room + 1)) for room in (image.width - width, image.height - height))
        crop = image.crop((left, top, left + width, top + height))
        save_png(crop.resize(image.size, Image.Resampling.BICUBIC), target)
    return target


def collate_pairs(
    pairs: Sequence[Pair], collate: Callable[[list[Sample]], Batch], reference: Callable[[Sample], float]
) -> PairBatch:
    """Pack pairs: chosen, rejected and corrupted side by side, pair after pair.

    Args:
        pairs: at least one.
        collate: samples -> packed batch with answers.
        reference: sample -> its answer's log-probability under the reference.
    """
    sides = [pair.samples for pair in pairs]
    starts = torch.tensor([0, *(len(side) for side in sides)]).cumsum(0)[:-1]
    whole = torch.tensor([number for number, side in enumerate(sides) if len(side) == 3], dtype=torch.int64)
    samples = [sample for side in sides for sample in side]
    return PairBatch(
        batch=collate(samples),
        chosen=starts,
        rejected=starts + 1,
        corrupted=starts[whole] + 2,
        corrupted_pair=whole,
        reference=torch.tensor([reference(sample) for sample in samples], dtype=torch.float32),
    )
