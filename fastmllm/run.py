"""Run a recipe step by step: the verbs that the command line and a notebook share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

import fastmllm
from fastmllm.alignment import preferences, prompts_of, rollouts_of
from fastmllm.data.build import Splits
from fastmllm.data.cache import cache_dir
from fastmllm.data.images import load_image
from fastmllm.data.mixture import MixtureSampler
from fastmllm.data.phases import Phase, PhasedMixture
from fastmllm.data.progress import progress_bar, waiting
from fastmllm.data.sample import Sample
from fastmllm.data.text import screen
from fastmllm.infer.respond import collate_for, template_of
from fastmllm.models.feature_store import FeatureStore
from fastmllm.models.features import FeatureCache
from fastmllm.models.mllm import MLLM
from fastmllm.models.talk import TalkConfig, load_mllm
from fastmllm.models.vlm import VLM, ModelConfig, build_vlm
from fastmllm.packed import PackedMixture, packing_of, tokens_an_image
from fastmllm.pairs import Learners, format_of, pairs_of
from fastmllm.streamed import StreamedBatches
from fastmllm.train.checkpoint import fingerprint
from fastmllm.train.engine import EngineConfig, launched_world_size
from fastmllm.train.grpo import GRPOObjective
from fastmllm.train.pairs import PAIR_KINDS
from fastmllm.train.prefer import PreferenceObjective
from fastmllm.train.rules import apply_rules
from fastmllm.train.stages import StageConfig
from fastmllm.train.trainer import BatchLike, StageResult, Trainer

TASKS = (
    *("name", "name_zh", "group", "group_zh", "caption", "exists", "yes_no"),
    *("count", "position", "relation", "scene"),
)


def load_model(config: ModelConfig | TalkConfig, seed: int = 0, console: Console | None = None) -> VLM | MLLM:
    """Build a recipe's model, keeping converted weights in the asset cache."""
    if isinstance(config, TalkConfig):
        with waiting(f"loading {config.folder or 'a composition'}", console):
            return load_mllm(config, cache=cache_dir() / "weights", seed=seed)
    with waiting(f"loading {config.vision} and {config.language}", console):
        return build_vlm(config, cache=cache_dir() / "weights", seed=seed)


def images_of(splits: Splits) -> list[str]:
    """List every image that training or evaluation looks at, once."""
    samples = (s for part in (splits.train, splits.eval) for task in part.values() for s in task)
    return list(dict.fromkeys(s.image for s in samples if s.image is not None))


def screen_splits(model: VLM | MLLM, splits: Splits) -> Splits:
    """Leave out, and count, what cannot be learned from or asked: no answer, no image, text outside the vocabulary."""
    assert model.tokenizer is not None
    skipped: Counter[str] = Counter(splits.skipped)
    parts: list[dict[str, list[Sample]]] = []
    for part in (splits.train, splits.eval):
        kept = {}
        for task, samples in part.items():
            kept[task], lost = screen(
                samples, model.tokenizer, template_of(model), vocab_size=model.language.config.vocab_size
            )
            skipped.update(lost)
        parts.append(kept)
    return replace(splits, train=parts[0], eval=parts[1], skipped=skipped)


def cache_features(
    model: VLM | MLLM, images: Iterable[str], folder: Path | None = None, console: Console | None = None
) -> None:
    """Encode images once with the frozen encoder and keep the features; nothing to do when the encoder is trained.

    Those of an `MLLM` are kept as they are needed, in its feature store.
    """
    if isinstance(model, MLLM) or model.config.train_vision:
        return
    cache = FeatureCache(model.vision, model.config.image_size, load_image, folder)
    with progress_bar(console or Console(), "encoding images") as advance:
        model.feature_cache = cache.add(images, progress=advance)


def available(stage: StageConfig | Phase, samples: Mapping[str, Sequence[Sample]], name: str = "") -> dict[str, float]:
    """Return the mixture without the tasks that this data does not offer (photographs have no groups or scenes).

    Raises:
        ValueError: a task that no data offers, or none that this data does.
    """
    where = f"stage {stage.name!r}" if isinstance(stage, StageConfig) else f"a phase of stage {name!r}"
    unknown = [task for task in stage.mixture if task not in TASKS]
    if unknown:
        raise ValueError(f"{where}: mixture names {unknown}, no such task; known: {', '.join(TASKS)}")
    weights = {task: weight for task, weight in stage.mixture.items() if samples.get(task)}
    if stage.mixture and not any(weights.values()):
        have = ", ".join(task for task in TASKS if samples.get(task))
        raise ValueError(f"{where}: this data has none of {', '.join(stage.mixture)}; it has {have}")
    return weights


def batches_of(
    model: VLM | MLLM, samples: Mapping[str, Sequence[Sample]], stage: StageConfig, engine: EngineConfig, folder: Path
) -> Callable[[int], Any]:
    """Return index -> batch, a pure function, so that an interrupted run goes on with the very same batches.

    Args:
        model: whose tokenizer and template the batches are for.
        samples: task -> questions.
        stage: which tasks, and how many samples a batch or up to which budget.
        engine: its accumulation, with the launched ranks, makes a step.
        folder: of the stage, for what packing writes down.
    """
    if stage.phases:
        return _phased(model, samples, stage, engine)
    weights = available(stage, samples)
    sampler = MixtureSampler(samples, weights or None, batch_size=stage.batch_size, seed=stage.seed)
    packing = packing_of(model, stage)
    samples_of = sampler.batch_samples if packing is None else PackedMixture(sampler, packing, engine, folder)

    def batch(index: int) -> Any:
        chosen, cache = samples_of(index), model.feature_cache
        cached = cache is not None and all(s.image is None or s.image in cache.features for s in chosen)
        made = collate_for(
            model,
            chosen,
            keep=tokens_an_image(stage.visual_tokens, stage.seed, index) if stage.visual_tokens else None,
            image_size=stage.image_size,
            load_pixels=not cached,
            with_answers=True,
        )
        return replace(made, budget=stage.max_tokens)

    return batch


def _phased(
    model: VLM | MLLM, samples: Mapping[str, Sequence[Sample]], stage: StageConfig, engine: EngineConfig
) -> Callable[[int], Any]:
    """Return what `batches_of` does, of a stage with phases.

    Raises:
        ValueError: image sizes or visual tokens for a model whose resolution policy says them.
    """
    if isinstance(model, MLLM) and any(phase.image_size or phase.visual_tokens for phase in stage.phases):
        raise ValueError(f"stage {stage.name!r}: image_size and visual_tokens of phases are for a VLM; leave them out")
    phases = [replace(phase, mixture=available(phase, samples, stage.name)) for phase in stage.phases]
    sampler = PhasedMixture(
        samples, phases, steps=stage.steps, micro_batches=engine.accumulation * launched_world_size(),
        batch_size=stage.batch_size, seed=stage.seed,
    )  # fmt: skip

    def batch(index: int) -> Any:
        chosen, cache, phase = sampler.batch_samples(index), model.feature_cache, sampler.phase(index)
        size, counts = phase.image_size or stage.image_size, phase.visual_tokens or stage.visual_tokens
        fits = cache is not None and size in (None, cache.image_size)
        cached = fits and all(s.image is None or s.image in cache.features for s in chosen)  # type: ignore[union-attr]
        keep = tokens_an_image(counts, stage.seed, index) if counts else None
        return collate_for(model, chosen, keep=keep, image_size=size, load_pixels=not cached, with_answers=True)

    return batch


def drop_stale_features(model: VLM | MLLM, stage: StageConfig, learner: nn.Module) -> None:
    """Forget cached features where the stage changes the encoder, or shows it other pixels; not only in this stage."""
    apply_rules(learner, stage.trainable)
    if isinstance(model, MLLM):
        return
    cache = model.feature_cache
    if cache is not None and (model.vision_learns or stage.image_size not in (None, cache.image_size)):
        model.feature_cache = None


def feature_store_of(model: VLM | MLLM, stage: StageConfig, engine: EngineConfig) -> FeatureStore | None:
    """Return where a stage keeps features of its images; None where it may not or cannot.

    Compressors that look into the encoder need it to run. A mixture of a `VLM` has its features in memory.
    """
    placement, room = model.placement, int(engine.feature_cache_gib * 2**30)
    if isinstance(model, MLLM):
        towers, packing = nn.ModuleList(model.images.towers()), model.packing
        if not room or packing is None or any(param.requires_grad for param in towers.parameters()):
            return None
        configs = [getattr(tower, "config", None) for tower in (model.images.vision, *towers)]
        before = type(model.images).__name__, configs, packing.policy
        return FeatureStore(cache_dir() / "features", towers, before, room)
    looked_into = placement.merge is not None or (
        placement.connector is not None and placement.connector.layer is not None
    )
    if not stage.sources or not room or model.vision_learns or looked_into:
        return None
    size = stage.image_size or model.config.image_size
    return FeatureStore(cache_dir() / "features", model.vision, size, room)


def train_stage(
    model: VLM | MLLM,
    splits: Splits,
    stage: StageConfig,
    engine: EngineConfig,
    out_dir: str | Path,
    *,
    save_every: int = 50,
    keep: int = 2,
    on_mismatch: str = "error",
    console: Console | None = None,
    learners: Learners | None = None,
) -> StageResult:
    """Train one stage through DeepSpeed; a finished one is reused, an interrupted one goes on.

    Args:
        model: trained in place.
        splits: of `fastmllm.data.build`.
        stage: what learns, from which mixture, for how long.
        engine: ZeRO stage and accumulation; its dtype is the model's (`engine_for`).
        out_dir: checkpoints, log and weights of this stage.
        save_every: steps between checkpoints.
        keep: newest checkpoints that stay: a damaged one gives way to the one before.
        on_mismatch: what to do when out_dir holds another recipe's run: "error" or "fresh".
        console: where progress goes.
        learners: of the stages before this one, whose heads it may go on with.
    """
    if model.config is None:
        raise ValueError("train_stage: this MLLM has no words: make it with fastmllm.models.talk.load_mllm")
    paired = stage.kind in PAIR_KINDS
    if isinstance(model, MLLM) and not paired and (stage.visual_tokens or stage.image_size):
        raise ValueError(
            f"stage {stage.name!r}: visual_tokens and image_size are for a VLM; the model's resolution "
            "policy says how large images are: leave them out, or change model.composition.resolution_sizes"
        )
    engine = stage.engine(engine_for(model.config, engine))
    learner = (learners or Learners(model))(stage)
    drop_stale_features(model, stage, learner)
    recipe: dict[str, Any] = {"model": asdict(model.config), "version": fastmllm.__version__}
    batches: Callable[[int], BatchLike]
    objective: Callable[[nn.Module], nn.Module] | None = None
    rollouts = None
    if not paired:
        model.feature_store = feature_store_of(model, stage, engine)
    folder = Path(out_dir) / stage.name
    if paired and not stage.sources:
        recipe["questions"] = fingerprint(questions_of(splits.train))
        batches = pairs_of(model, splits.train, available(stage, splits.train), stage, engine)
    elif stage.sources:
        pairs = format_of(model, stage) if paired else None
        streamed = StreamedBatches(model, stage, engine, folder, console, pairs)
        batches, recipe["stream"] = streamed, streamed.loader.stream.identity()
    else:
        recipe["questions"] = fingerprint(questions_of(splits.train))
        if stage.kind == "prefer":
            weights = available(stage, splits.train)
            found = preferences(model, splits.train, weights, stage, engine, Path(out_dir), console)
            batches, recipe["reference"] = found.batches, found.reference.of
            objective = partial(PreferenceObjective, config=stage.prefer)
        elif stage.kind == "grpo":
            batches = prompts_of(model, splits.train, available(stage, splits.train), stage, engine)
            objective, rollouts = partial(GRPOObjective, config=stage.grpo), rollouts_of(model, stage)
        else:
            batches = batches_of(model, splits.train, stage, engine, folder)
    trainer = Trainer(
        learner,
        stage,
        engine,
        batches,
        folder,
        objective=objective,
        rollouts=rollouts,
        recipe=recipe,
        on_mismatch=on_mismatch,
        save_every=save_every,
        keep=keep,
        console=console,
    )
    kept = model.feature_cache
    if stage.sources:
        model.feature_cache = None  # of other images: here every rank encodes, or looks into the store
    try:
        return trainer.run()
    finally:
        model.feature_cache, model.feature_store = kept, None  # type: ignore[assignment]


def precision_of(config: ModelConfig | TalkConfig) -> str:
    """Return the dtype that `model.dtype` means on this machine, by name; it is also the engine's."""
    return str(config.torch_dtype()).removeprefix("torch.")


def engine_for(config: ModelConfig | TalkConfig, engine: EngineConfig) -> EngineConfig:
    """Return the engine's configuration in the model's dtype.

    Raises:
        ValueError: `engine.dtype` is set, and to another one.
    """
    dtype = precision_of(config)
    if engine.dtype not in ("auto", dtype):
        raise ValueError(
            f"engine.dtype is {engine.dtype}, but model.dtype={config.dtype} means {dtype} on this machine; leave "
            f"engine.dtype out, or set model.dtype={engine.dtype}"
        )
    return replace(engine, dtype=dtype)


def questions_of(part: Mapping[str, Sequence[Sample]]) -> list[Any]:
    """List all that an answer depends on but the weights: words, truth, and the image files as they are."""
    stamps: dict[str, Any] = {}
    for sample in (s for task in part.values() for s in task):
        if sample.image is not None and sample.image not in stamps:
            stat = os.stat(sample.image)
            stamps[sample.image] = (sample.image, stat.st_size, stat.st_mtime_ns)
    return [
        (task, s.id, s.prompt, s.answer, s.choices, s.references, dict(s.truth), stamps.get(s.image or ""))
        for task, samples in sorted(part.items())
        for s in samples
    ]
