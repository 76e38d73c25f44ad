"""What a stage of kind `prefer` learns from: pairs, their reference log-probabilities, and batches of both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastmllm.data.mixture import MixtureSampler
from fastmllm.data.packing import Batch
from fastmllm.data.preference import Pair, PairBatch, collate_pairs, pairs_of
from fastmllm.data.progress import progress_bar
from fastmllm.data.sample import Sample
from fastmllm.infer.respond import collate_for
from fastmllm.models.vlm import VLM
from fastmllm.train.checkpoint import model_fingerprint
from fastmllm.train.engine import EngineConfig, init_ranks, launched_world_size
from fastmllm.train.reference import ReferenceCache
from fastmllm.train.stages import StageConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Preferences:
    """What the trainer needs of a preference stage.

    Args:
        batches: index -> batch, a pure function.
        reference: the log-probabilities that the batches carry.
        skipped: reason -> ids of the samples that made no pair.
    """

    batches: Callable[[int], PairBatch]
    reference: ReferenceCache
    skipped: Mapping[str, Sequence[str]]


def answers_of(model: VLM, stage: StageConfig) -> Callable[[Sequence[Sample]], Batch]:
    """Return what packs samples with their answers, pixels only where features are not cached."""
    keep = stage.visual_tokens[0] if stage.visual_tokens else model.config.visual_tokens

    def collate(samples: Sequence[Sample]) -> Batch:
        features = {} if model.feature_cache is None else model.feature_cache.features
        cached = all(sample.image is None or sample.image in features for sample in samples)
        size = model.config.image_size
        return collate_for(model, samples, keep=keep, image_size=size, load_pixels=not cached, with_answers=True)

    return collate


def preferences(
    model: VLM,
    samples: Mapping[str, Sequence[Sample]],
    weights: Mapping[str, float],
    stage: StageConfig,
    engine: EngineConfig,
    out_dir: Path,
    console: Console | None = None,
) -> Preferences:
    """Make pairs of a right and a wrong answer and look up, or compute, what the model thinks of them before it learns.

    Args:
        model: with the weights that the stage starts from.
        samples: task -> questions.
        weights: task -> weight; empty = by their number.
        stage: of kind "prefer".
        engine: accumulation and ranks say how many pairs a step draws.
        out_dir: gets crops/ and reference/.
        console: where progress and what was skipped go.
    """
    console = console or Console()
    tasks = {task: samples[task] for task in weights or samples}
    pairs, skipped = pairs_of(tasks, out_dir / "crops" if stage.prefer.image else None, seed=stage.seed)
    by_id = {pair.chosen.id: pair for task in pairs.values() for pair in task}
    chosen = {task: [pair.chosen for pair in found] for task, found in pairs.items()}
    kept = {task: weight for task, weight in weights.items() if chosen.get(task)}
    sampler = MixtureSampler(chosen, kept or None, batch_size=stage.batch_size, seed=stage.seed)

    def drawn(index: int) -> list[Pair]:
        return [by_id[sample.id] for sample in sampler.batch_samples(index)]

    ranks = launched_world_size()
    used = {pair.chosen.id: pair for i in range(stage.steps * engine.accumulation * ranks) for pair in drawn(i)}
    if model.feature_cache is not None:
        model.feature_cache.add(s.image for pair in used.values() for s in pair.samples if s.image is not None)
    collate = answers_of(model, stage)
    reference = reference_of(model, stage, out_dir, _chunks(list(used.values()), stage.batch_size), engine, console)
    for reason, ids in skipped.items():
        console.print(f"{stage.name}: {len(ids)} samples make no pair ({reason}): {', '.join(ids[:4])} …")
    return Preferences(
        batches=lambda index: collate_pairs(drawn(index), collate, reference.__getitem__),
        reference=reference,
        skipped=skipped,
    )


def _chunks(pairs: Sequence[Pair], size: int) -> list[list[Sample]]:
    """Return samples to compute together: those of one image side by side."""
    return [[s for pair in pairs[i : i + size] for s in pair.samples] for i in range(0, len(pairs), size)]


def reference_of(
    model: VLM,
    stage: StageConfig,
    out_dir: Path,
    chunks: Sequence[Sequence[Sample]],
    engine: EngineConfig,
    console: Console,
) -> ReferenceCache:
    """Look up or compute the log-probabilities of answers under a model as it is now, shared out over the ranks."""
    collate = answers_of(model, stage)
    identity: dict[str, Any] = {
        "model": asdict(model.config),
        "keep": stage.visual_tokens[:1],
        "placement": repr(model.placement),
        "tokenizer": hashlib.sha256(model.tokenizer.to_str().encode()).hexdigest(),
    }
    cache = ReferenceCache(out_dir / "reference", model_fingerprint(model), identity)
    if cache.damaged is not None:
        console.print(f"{stage.name}: {cache.damaged}")
    rank, ranks = 0, launched_world_size()
    if ranks > 1:
        rank, ranks, _ = init_ranks(engine.timeout_s)

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(values, value)
        return values

    model.eval()
    with progress_bar(console, "reference log-probabilities") as advance:
        cache.add(
            chunks, lambda chunk: model.log_probs(collate(chunk)), rank=rank, ranks=ranks, progress=advance,
            **({"gather": gather} if ranks > 1 else {}),
        )  # fmt: skip
    return cache
