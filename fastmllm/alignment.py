"""What stages of the kinds `prefer` and `grpo` learn from: pairs and their reference; prompts and judged answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastmllm.data.mixture import MixtureSampler
from fastmllm.data.packing import Batch
from fastmllm.data.preference import Pair, PairBatch, collate_pairs, pairs_of
from fastmllm.data.progress import progress_bar
from fastmllm.data.sample import Sample
from fastmllm.data.text import end_token, normalise
from fastmllm.eval.parsing import parse_choice
from fastmllm.infer.generation import generate_tokens
from fastmllm.infer.respond import collate_for, template_of
from fastmllm.infer.sampling import SamplingParams
from fastmllm.models.mllm import MLLM
from fastmllm.models.vlm import VLM
from fastmllm.train.checkpoint import model_fingerprint
from fastmllm.train.engine import EngineConfig, init_ranks, launched_world_size
from fastmllm.train.grpo import Prompts
from fastmllm.train.reference import ReferenceCache
from fastmllm.train.rollouts import Rollouts
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


def packed(model: VLM | MLLM, stage: StageConfig, samples: Sequence[Sample], with_answers: bool = True) -> Any:
    """Pack samples, with pixels only where features are not cached."""
    features = {} if model.feature_cache is None else model.feature_cache.features
    cached = all(sample.image is None or sample.image in features for sample in samples)
    return collate_for(
        model, samples, keep=next(iter(stage.visual_tokens), None), image_size=stage.image_size, load_pixels=not cached,
        with_answers=with_answers,
    )  # fmt: skip


def preferences(
    model: VLM | MLLM,
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

    Raises:
        ValueError: no sample makes a pair.
    """
    console = console or Console()
    tasks = {task: samples[task] for task in samples if not weights or weights.get(task)}
    pairs, skipped = pairs_of(tasks, out_dir / "crops" if stage.prefer.image else None, seed=stage.seed)
    if not pairs:
        reasons = ", ".join(f"{len(ids)} {reason}" for reason, ids in skipped.items())
        raise ValueError(f"stage {stage.name!r}: no sample makes a pair ({reasons}); give questions of a closed set")
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
    reference = reference_of(model, stage, out_dir, _chunks(list(used.values()), stage.batch_size), engine, console)
    for reason, ids in skipped.items():
        console.print(f"{stage.name}: {len(ids)} samples make no pair ({reason}): {', '.join(ids[:4])} …")
    return Preferences(
        batches=lambda index: collate_pairs(drawn(index), partial(packed, model, stage), reference.__getitem__),
        reference=reference,
        skipped=skipped,
    )


def _chunks(pairs: Sequence[Pair], size: int) -> list[list[Sample]]:
    """Return samples to compute together: those of one image side by side."""
    return [[s for pair in pairs[i : i + size] for s in pair.samples] for i in range(0, len(pairs), size)]


def reference_of(
    model: VLM | MLLM,
    stage: StageConfig,
    out_dir: Path,
    chunks: Sequence[Sequence[Sample]],
    engine: EngineConfig,
    console: Console,
) -> ReferenceCache:
    """Look up or compute the log-probabilities of answers under a model as it is now, shared out over the ranks."""
    assert model.config is not None
    assert model.tokenizer is not None
    identity: dict[str, Any] = {
        "model": asdict(model.config),
        "keep": stage.visual_tokens[:1],
        "image_size": stage.image_size,
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
            chunks, lambda chunk: model.log_probs(packed(model, stage, chunk)), rank=rank, ranks=ranks,
            progress=advance, **({"gather": gather} if ranks > 1 else {}),
        )  # fmt: skip
    return cache


def correct(sample: Sample, text: str) -> float:
    """Return 1 for a right answer, else 0: the right choice of a closed set, else the answer's own words."""
    right = {normalise(answer) for answer in (sample.answer, *sample.references)}
    said = parse_choice(text, sample.choices) if sample.choices else text
    return float(said is not None and normalise(said) in right)


def rollouts_of(model: VLM | MLLM, stage: StageConfig) -> Rollouts:
    """Return what samples answers with the model's own generation and judges them as evaluation does."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    config, end = stage.grpo, end_token(tokenizer, template_of(model))

    def sample(prompts: Any) -> list[list[int]]:
        params = SamplingParams(temperature=1.0, seed=stage.seed, max_new_tokens=config.max_new_tokens)
        answers = generate_tokens(model, prompts, params, stop=(end,))
        # one that did not end by itself must not learn to
        return [ids if len(ids) == config.max_new_tokens else [*ids, end] for ids in answers]

    def reward(asked: Sample, tokens: Sequence[int]) -> float:
        return correct(asked, tokenizer.decode([token for token in tokens if token != end]))

    def collate(samples: Sequence[Sample], tokens: list[list[int]], prompts: Any) -> Any:
        answered = collate_for(
            model, samples, keep=next(iter(stage.visual_tokens), None), image_size=stage.image_size, load_pixels=False,
            with_answers=True, answers=tokens,
        )  # fmt: skip
        return replace(answered, pixels=prompts.pixels) if isinstance(answered, Batch) else answered

    return Rollouts(model, config, sample, reward, collate)


def prompts_of(
    model: VLM | MLLM, samples: Mapping[str, Sequence[Sample]], weights: Mapping[str, float], stage: StageConfig,
    engine: EngineConfig,
) -> Callable[[int], Prompts]:  # fmt: skip
    """Return index -> prompts, a pure function; the steps on one set of answers have the same prompts."""
    sampler = MixtureSampler(samples, weights or None, batch_size=stage.batch_size, seed=stage.seed)
    a_step = engine.accumulation * launched_world_size()

    def prompts(index: int) -> Prompts:
        index -= index // a_step % stage.grpo.inner * a_step
        # a name of its own: it seeds the answer
        asked = [
            replace(sample, id=f"{sample.id}#{index}.{place}.{number}")
            for place, sample in enumerate(sampler.batch_samples(index))
            for number in range(stage.grpo.group)
        ]
        return Prompts(batch=packed(model, stage, asked, with_answers=False), samples=asked)

    return prompts
