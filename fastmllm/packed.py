"""Which samples a stage puts into a micro-batch: as many as fit its budget of positions and images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastmllm.data.images import ImageError
from fastmllm.data.mixture import MixtureSampler
from fastmllm.data.packer import Budget, Packing, Size
from fastmllm.data.packing_journal import Journal
from fastmllm.data.rows import size_of
from fastmllm.data.sample import Sample
from fastmllm.data.shard_index import Skipped
from fastmllm.data.skipped_log import SkippedLog
from fastmllm.data.text import TextError
from fastmllm.infer.pictures import spelled_size
from fastmllm.infer.respond import template_of
from fastmllm.models.mllm import MLLM
from fastmllm.models.vlm import VLM
from fastmllm.train.checkpoint import fingerprint
from fastmllm.train.engine import EngineConfig, launched_world_size
from fastmllm.train.stages import StageConfig


def tokens_an_image(counts: Sequence[int], seed: int, index: int) -> int:
    """Return how many tokens an image takes in a micro-batch: one of the counts, drawn by its number."""
    return counts[hashlib.sha256(f"{seed}/{index}".encode()).digest()[0] % len(counts)]


def packing_of(model: VLM | MLLM, stage: StageConfig) -> Packing | None:
    """Return how a stage fills its micro-batches; None where each has `batch_size` samples."""
    if not stage.max_tokens:
        return None
    budget = Budget(max_tokens=stage.max_tokens, max_images=stage.max_images)
    if isinstance(model, MLLM):  # each image takes its own number of tokens, which stand in its sample's size
        size = partial(spelled_size, model=model, template=template_of(model))
        none = partial(tokens_an_image, (0,), stage.seed)
        return Packing(budget=budget, size_of=size, tokens_an_image=none, most_tokens_an_image=0)
    counts = stage.visual_tokens or (model.config.visual_tokens,)
    return Packing(
        budget=budget,
        size_of=partial(
            size_of, tokenizer=model.tokenizer, template=template_of(model), vocab_size=model.language.config.vocab_size
        ),
        tokens_an_image=partial(tokens_an_image, counts, stage.seed),
        most_tokens_an_image=max(counts),
    )


class PackedMixture:
    """Fill micro-batches from a mixture of questions: index -> samples, a pure function.

    Args:
        sampler: of the mixture.
        packing: budget and sizes.
        engine: its accumulation, with the launched ranks, makes a step.
        folder: of the stage: where packing stands is written down there, and what is left out.
    """

    def __init__(self, sampler: MixtureSampler, packing: Packing, engine: EngineConfig, folder: Path) -> None:
        rank = int(os.environ.get("RANK", "0"))
        self._sampler, self._size_of = sampler, packing.size_of
        self._packer = packing.packer(self._size, self._name, engine.accumulation * launched_world_size())
        of = [[(task, [s.id for s in sampler.samples[task]]) for task in sampler.tasks], sampler.schedule.weights]
        identity = fingerprint([*of, sampler.seed, packing.identity(), self._packer.lanes])
        self._packer.journal = Journal(folder, rank, self._packer.lanes, identity)
        self._log = SkippedLog(folder, rank)

    def __call__(self, index: int) -> list[Sample]:
        """Return the samples of a micro-batch; at least one.

        Raises:
            ValueError: nothing fits into the budget.
        """
        filled = self._packer(index)
        assert self._packer.journal is not None
        self._packer.journal.note(filled)
        self._log.note(index, filled.skipped)
        return [self._sampler.draw(draw) for draw in filled.draws]

    def _size(self, draw: int) -> Size | Skipped:
        sample = self._sampler.draw(draw)
        try:
            return self._size_of(sample)
        except (ImageError, TextError) as error:
            reason = "undecodable image" if isinstance(error, ImageError) else "unusable text"
            return Skipped(shard=sample.task, key=sample.id, reason=reason, detail=str(error))

    def _name(self, draw: int) -> tuple[str, str]:
        sample = self._sampler.draw(draw)
        return sample.task, sample.id
