"""What a score must beat: no image, the wrong image, the majority answer, a random answer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fastmllm.data.sample import Sample

BLIND, WRONG, MAJORITY, RANDOM = "blind", "wrong image", "majority", "random"


def without_image(samples: Sequence[Sample]) -> list[Sample]:
    """Ask the same questions with no image: what the words alone give away."""
    return [replace(s, image=None) for s in samples]


def with_wrong_image(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Give each question the image of another one: of another subject where images have one, else any other image.

    A question without such a donor keeps no image, so that it can never be asked with the right one.
    """
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    where = {index: place for place, index in enumerate(order)}
    swapped = []
    for i, sample in enumerate(samples):
        donors = (samples[order[(where[i] + step) % len(order)]] for step in range(1, len(order)))
        donor = next((d for d in donors if _differs(d, sample)), None)
        swapped.append(replace(sample, image=donor.image if donor else None))
    return swapped


def _differs(donor: Sample, sample: Sample) -> bool:
    if donor.image is None or donor.image == sample.image:
        return False
    # a scene has no single subject: its answer may be right by chance, as any answer may
    return "concept" not in sample.truth or donor.truth.get("concept") != sample.truth["concept"]


def limited(samples: Sequence[Sample], limit: int, seed: int = 0) -> list[Sample]:
    """Draw images and keep all their questions until `limit` is reached; 0 keeps everything, in order.

    The first ones of a list would be the first classes of a folder. Questions whose truth names a "cluster" (a pair of
    scenes, a sentence over several) stay together: a cluster that does not fit is left out whole.
    """
    if not limit or limit >= len(samples):
        return list(samples)
    together: dict[str | None, list[Sample]] = {}
    for s in samples:
        together.setdefault(s.truth.get("cluster") or s.image, []).append(s)
    groups = list(together)
    random.Random(f"limit, {seed}").shuffle(groups)
    chosen: list[Sample] = []
    for group in groups:
        found = together[group]
        if "cluster" not in found[0].truth or len(chosen) + len(found) <= limit:
            chosen += found
        if len(chosen) >= limit:
            break
    return chosen[:limit]


def majority_answer(samples: Sequence[Sample], train: Sequence[Sample], seed: int = 0) -> list[str]:
    """Answer with the training set's most frequent answer, or choice where there are choices; ties are drawn."""
    rng = random.Random(f"majority ties, {seed}")
    frequency = Counter(s.answer for s in train) or Counter(s.answer for s in samples)
    common = sorted(frequency, key=lambda a: (-frequency[a], a))
    answers = []
    for sample in samples:
        if sample.choices:
            best = max(frequency[c] for c in sample.choices)
            answers.append(rng.choice(sorted(c for c in sample.choices if frequency[c] == best)))
        else:
            answers.append(common[0])
    return answers


def random_answer(samples: Sequence[Sample], closed_set: Sequence[str], seed: int = 0) -> list[str]:
    """Answer every question with a uniformly drawn member of its choices or of the closed set."""
    rng = random.Random(f"random answers, {seed}")
    return [rng.choice(sorted(s.choices) if s.choices else list(closed_set)) for s in samples]


def words_answer(samples: Sequence[Sample], seed: int = 0) -> list[str]:
    """Answer by the words alone: the most frequent answer to the very same question about the other half of the images.

    What a model that learned a set's habits and never looks would score; habits are a source's (POPE's splits). A
    question that the other half does not ask gets that half's most frequent answer.
    """
    images = sorted({s.image or s.id for s in samples})
    random.Random(f"halves, {seed}").shuffle(images)
    first = set(images[: len(images) // 2])
    answers: list[str] = [""] * len(samples)
    for half in (True, False):
        asked: dict[tuple[str, str], Counter[str]] = {}
        for s in samples:
            if ((s.image or s.id) in first) != half:
                asked.setdefault((s.source, s.prompt), Counter())[s.answer] += 1
        every = sum(asked.values(), Counter())
        common = max(sorted(every), key=every.__getitem__, default="")
        for i, s in enumerate(samples):
            if ((s.image or s.id) in first) == half:
                seen = asked.get((s.source, s.prompt), Counter())
                answers[i] = max(sorted(seen), key=lambda a: (seen[a], a == common), default=common)
    return answers
