"""Batches of a stage that learns from shards, and the list of what could not be used."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from fastmllm.data.balance import BatchPlan
from fastmllm.data.captions import CaptionBatch, Captioned, CaptionFormat
from fastmllm.data.images import load_image
from fastmllm.data.loader import Loader
from fastmllm.data.packing import Batch, join
from fastmllm.data.rows import Row, prepare, unscored
from fastmllm.data.sample import Conversation
from fastmllm.data.shards import ShardSource
from fastmllm.data.skipped_log import SkippedLog
from fastmllm.data.stream import Drawn, Sizes, Stream
from fastmllm.data.token_shares import TokenShares
from fastmllm.infer.pictures import Spelled, pack_spelled, spell
from fastmllm.infer.respond import template_of
from fastmllm.models.feature_store import FeatureStore
from fastmllm.models.inputs import Inputs
from fastmllm.models.mllm import MLLM
from fastmllm.models.vlm import IMAGE_TOKEN_ID, VLM
from fastmllm.packed import packing_of, tokens_an_image
from fastmllm.train.engine import EngineConfig, launched_world_size
from fastmllm.train.stages import StageConfig


class StreamedBatches:
    """Index -> batch, a pure function, from a stage's sources.

    `skipped.jsonl` of `out_dir` lists what was left out, `shares.jsonl` what came from each source.

    Args:
        model: whose tokenizer, template and image size the batches are for.
        stage: with sources.
        engine: its accumulation, with the launched ranks, makes a step.
        out_dir: of the stage; rank r > 0 writes `skipped-r.jsonl`. Steps that are done again are listed again.
        console: of rank 0's output.
        pairs: how samples become pairs, for a stage that learns from those; its batches always have `batch_size`.

    Raises:
        ValueError: no shards, or nothing usable in them.
    """

    def __init__(
        self,
        model: VLM | MLLM,
        stage: StageConfig,
        engine: EngineConfig,
        out_dir: Path,
        console: Console | None = None,
        pairs: CaptionFormat | None = None,
    ) -> None:
        ranks, rank = launched_world_size(), int(os.environ.get("RANK", "0"))
        sources = [ShardSource(config, seed=stage.seed) for config in stage.sources]
        if pairs is not None:
            load, join_drawn = _captioned(pairs, engine.accumulation * ranks)
        else:
            load, join_drawn = _pictures(model, stage) if isinstance(model, MLLM) else _squares(model, stage)
        cost: Callable[[Sizes], int] = partial(patches_of, model) if isinstance(model, MLLM) and pairs is None else len
        packing = packing_of(model, stage) if pairs is None else None
        plan = BatchPlan(
            batch_size=stage.batch_size,
            micro_batches=engine.accumulation * ranks,
            ranks=ranks,
            window=stage.balance_steps,
            full=pairs is not None,
            seed=stage.seed,
        )
        stream = Stream(sources, load, plan, cost=cost, packing=packing)
        stream.keep_journal(out_dir, rank)
        self.loader = Loader(stream, join_drawn, workers=engine.workers, on_batch=self._note)
        self._log = SkippedLog(out_dir, rank, before=stream.skipped)
        self._shares = TokenShares(out_dir, rank, [config.name for config in stage.sources])
        if rank == 0 and (reasons := Counter(item.reason for item in stream.skipped())):
            told = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
            (console or Console()).print(
                f"{stage.name}: left out of the sources: {told}; see {self._log.path}", highlight=False, soft_wrap=True
            )

    def __call__(self, index: int) -> Any:
        batch = self.loader.at(index)
        self._shares.note(index, batch.ids, batch.cu_seqlens, _labels_of(batch))
        return batch

    def _note(self, drawn: Drawn[None]) -> None:
        self._log.note(drawn.index, drawn.skipped)


def _labels_of(batch: Any) -> Tensor | None:
    return batch.plan.labels if isinstance(batch, Inputs) else getattr(batch, "labels", None)


class _Rows:
    """Make rows of samples; an image that several of a micro-batch show is read once, or its features are."""

    def __init__(
        self, row_of: Callable[..., Row], counts: Sequence[int], seed: int, store: FeatureStore | None = None
    ) -> None:
        self._row_of, self._counts, self._seed, self._store = row_of, counts, seed, store
        self._index, self._load = -1, self._open

    def __call__(self, sample: Conversation, index: int) -> Row:
        if index != self._index:
            self._index, self._load = index, cache(self._open)
        each = tokens_an_image(self._counts, self._seed, index)
        return self._row_of(sample, num_visual_tokens=each, load=self._load)

    def _open(self, path: str, size: int) -> Tensor:
        try:
            features = None if self._store is None else self._store.get(path)
        except OSError:
            features = None  # reading it says why
        return load_image(path, size) if features is None else features

    def __reduce__(self) -> tuple[Any, ...]:
        return _Rows, (self._row_of, self._counts, self._seed, self._store)


def _squares(model: VLM, stage: StageConfig) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what reads a sample and what makes a batch, for a model of square images."""
    row_of = partial(
        prepare,
        tokenizer=model.tokenizer,
        image_size=stage.image_size or model.config.image_size,
        image_token_id=IMAGE_TOKEN_ID,
        template=template_of(model),
        vocab_size=model.language.config.vocab_size,
    )
    counts = stage.visual_tokens or (model.config.visual_tokens,)
    rows = _Rows(row_of, counts, stage.seed, model.feature_store)
    return rows, partial(_batch_of, budget=stage.max_tokens)


def _pictures(model: MLLM, stage: StageConfig) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what reads a sample and what makes a batch, for a model with a resolution policy."""
    template = template_of(model)

    def load(sample: Conversation, index: int) -> Spelled:
        return spell(sample, model, template)

    def batch(drawn: Drawn[Spelled]) -> Inputs:
        return replace(pack_spelled(model, drawn.items, scored=drawn.scored), budget=stage.max_tokens)

    return load, batch


def patches_of(model: MLLM, sizes: Sizes) -> int:
    """Return the rows that a model's encoders compute of pictures, by (width, height); those it refuses are skipped."""
    rows = 0
    for width, height in sizes:
        with suppress(ValueError):
            rows += model.known_packing().policy.plan(width, height).vit_tokens
    return rows


def _captioned(pairs: CaptionFormat, micro_batches: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what reads a sample and what makes a batch, for a stage that learns from pairs."""

    def load(sample: Conversation, index: int) -> Captioned:
        return pairs.read(sample)

    def batch(drawn: Drawn[Captioned]) -> CaptionBatch:
        return pairs.batch(drawn.items, drawn.index // micro_batches)

    return load, batch


def _batch_of(drawn: Drawn[Row], budget: int) -> Batch:
    return join(drawn.items if drawn.scored else [unscored(row) for row in drawn.items], budget)
