"""Batches of a stage that learns from shards, and the list of what could not be used."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console

from fastmllm.data.balance import BatchPlan
from fastmllm.data.loader import Loader
from fastmllm.data.packing import Batch, join
from fastmllm.data.rows import Row, prepare, unscored
from fastmllm.data.sample import Conversation
from fastmllm.data.shard_index import Skipped
from fastmllm.data.shards import ShardSource
from fastmllm.data.stream import Drawn, Stream
from fastmllm.infer.respond import template_of
from fastmllm.models.vlm import IMAGE_TOKEN_ID, VLM
from fastmllm.train.engine import EngineConfig, launched_world_size
from fastmllm.train.stages import StageConfig


def tokens_an_image(counts: Sequence[int], seed: int, index: int) -> int:
    """Return how many tokens an image takes in a micro-batch: one of the counts, drawn by its number."""
    return counts[hashlib.sha256(f"{seed}/{index}".encode()).digest()[0] % len(counts)]


class StreamedBatches:
    """Index -> batch, a pure function, from a stage's sources; `skipped.jsonl` of `out_dir` lists what was left out.

    Args:
        model: whose tokenizer, template and image size the batches are for.
        stage: with sources.
        engine: its accumulation, with the launched ranks, makes a step.
        out_dir: of the stage; rank r > 0 writes `skipped-r.jsonl`. Steps that are done again are listed again.
        console: of rank 0's output.

    Raises:
        ValueError: no shards, or nothing usable in them.
    """

    def __init__(
        self, model: VLM, stage: StageConfig, engine: EngineConfig, out_dir: Path, console: Console | None = None
    ) -> None:
        ranks, self._rank = launched_world_size(), int(os.environ.get("RANK", "0"))
        sources = [ShardSource(config, seed=stage.seed) for config in stage.sources]
        row_of = partial(
            prepare,
            tokenizer=model.tokenizer,
            image_size=stage.image_size or model.config.image_size,
            image_token_id=IMAGE_TOKEN_ID,
            template=template_of(model),
            vocab_size=model.language.config.vocab_size,
        )
        counts = stage.visual_tokens or (model.config.visual_tokens,)
        plan = BatchPlan(
            batch_size=stage.batch_size,
            micro_batches=engine.accumulation * ranks,
            ranks=ranks,
            window=stage.balance_steps,
            seed=stage.seed,
        )
        stream = Stream(sources, partial(_load, row_of=row_of, counts=counts, seed=stage.seed), plan, cost=len)
        self.loader = Loader(stream, _batch_of, workers=engine.workers, on_batch=self._note)
        self._path = out_dir / ("skipped.jsonl" if self._rank == 0 else f"skipped-{self._rank}.jsonl")
        self._begun = False
        if self._rank == 0 and (reasons := Counter(item.reason for item in stream.skipped())):
            told = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
            (console or Console()).print(
                f"{stage.name}: left out of the sources: {told}; see {self._path}", highlight=False, soft_wrap=True
            )

    def __call__(self, index: int) -> Batch:
        return self.loader.at(index)

    def _note(self, drawn: Drawn[None]) -> None:
        # Not before the first batch: the trainer may set the folder aside until then.
        if not self._begun and self._rank == 0 and not self._path.exists():
            self._write(self.loader.stream.skipped())
        self._begun = True
        self._write(drawn.skipped, micro_batch=drawn.index)

    def _write(self, skipped: Iterable[Skipped], **more: int) -> None:
        lines = [json.dumps(asdict(item) | more) + "\n" for item in skipped]
        if lines:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)


def _load(sample: Conversation, index: int, *, row_of: Callable[..., Row], counts: Sequence[int], seed: int) -> Row:
    return row_of(sample, num_visual_tokens=tokens_an_image(counts, seed, index))


def _batch_of(drawn: Drawn[Row]) -> Batch:
    return join(drawn.items if drawn.scored else [unscored(row) for row in drawn.items])
