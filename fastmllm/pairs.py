"""What stages of kind `contrastive` and `qformer` train, made of a recipe's model, and the pairs that they see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import nn

from fastmllm.data.captions import CaptionBatch, CaptionFormat
from fastmllm.data.mixture import MixtureSampler
from fastmllm.data.sample import Sample
from fastmllm.data.text import end_token
from fastmllm.infer.respond import template_of
from fastmllm.models.composed_paths import Queries
from fastmllm.models.dual_encoder import DualEncoder
from fastmllm.models.encoder import Encoder
from fastmllm.models.language import LanguageModel
from fastmllm.models.mllm import MLLM
from fastmllm.models.pretraining import QFormerStage
from fastmllm.models.vlm import VLM
from fastmllm.modules.qformer_losses import QFormerPretraining
from fastmllm.train.checkpoint import fingerprint
from fastmllm.train.engine import EngineConfig, launched_world_size
from fastmllm.train.pairs import PAIR_KINDS
from fastmllm.train.stages import StageConfig

CAPTIONS = ("caption", "scene", "name", "name_zh", "group", "group_zh")  # tasks whose answers describe the image


class Learners:
    """What stages train: a model, or what a kind of stage makes of its parts, which it shares.

    So the next stage has what this one learned: a contrastive stage's image tower is the model's, a Q-Former's queries,
    attention and cross-attention are its connector's. A stage that says the same of itself goes on with the same heads.

    Args:
        model: of the recipe.
    """

    def __init__(self, model: VLM | MLLM) -> None:
        self.model = model
        self._made: dict[str, nn.Module] = {}

    def __call__(self, stage: StageConfig) -> nn.Module:
        """Return what a stage trains.

        Raises:
            ValueError: the model has not the parts that this kind of stage is for.
        """
        if stage.kind not in PAIR_KINDS:
            return self.model
        config = stage.contrastive if stage.kind == "contrastive" else stage.qformer
        key = fingerprint([stage.kind, asdict(config)])
        if key not in self._made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stage.seed)
                made = _towers(self.model, stage) if stage.kind == "contrastive" else _matching(self.model, stage)
            self._made[key] = made.to(self.model.language.head_weight)
        return self._made[key]


def _towers(model: VLM | MLLM, stage: StageConfig) -> DualEncoder:
    config = stage.contrastive
    text = model.language
    if config.text is not None:
        text = LanguageModel(replace(config.text, tie_embeddings=True))
    return DualEncoder(_tower(model, stage), text, config.width, config.loss)


def _matching(model: VLM | MLLM, stage: StageConfig) -> QFormerStage:
    config, connector = stage.qformer, getattr(getattr(model, "images", None), "connector", None)
    if not isinstance(connector, Queries):
        raise ValueError(
            f"stage {stage.name!r}: kind qformer trains the Q-Former of a composition, and this model has none; give "
            "model.composition.connector=qformer"
        )
    vocab = model.language.config.vocab_size
    reading = connector.qformer.with_text(vocab + 2, config.text_tokens)  # two rows more: see `format_of`
    heads = QFormerPretraining(
        reading, feature_width=config.width, temperature=config.temperature, smoothing=config.smoothing
    )
    return QFormerStage(_tower(model, stage), heads, bos_token_id=vocab + 1)


def _tower(model: VLM | MLLM, stage: StageConfig) -> Encoder:
    """Return the encoder, which must take squares of pixels."""
    tower = model.vision if isinstance(model, VLM) else model.images.vision
    if not isinstance(tower, Encoder):
        raise ValueError(
            f"stage {stage.name!r}: kind {stage.kind} is for an encoder of square images, and {type(tower).__name__} "
            "is none; train it in a stage of kind instruct"
        )
    return tower


def format_of(model: VLM | MLLM, stage: StageConfig) -> CaptionFormat:
    """Return how samples become a stage's pairs.

    A text tower reads [caption][end]; a Q-Former [CLS][caption][end], whose [CLS], and the token that starts writing,
    are two rows behind the model's vocabulary.

    Raises:
        ValueError: an image size that the encoder cannot cut into patches.
    """
    assert model.tokenizer is not None
    tower, matching = _tower(model, stage), stage.kind == "qformer"
    own = model.config.image_size if isinstance(model, VLM) else tower.config.image_size  # type: ignore[union-attr]
    size: int = stage.image_size or own  # type: ignore[assignment]
    if size % tower.stride:
        raise ValueError(
            f"stage {stage.name!r}: image_size: {size} px is no multiple of {tower.stride}, the stride of the encoder"
        )
    text = stage.contrastive.text if stage.kind == "contrastive" else None
    vocab = (text or model.language.config).vocab_size
    return CaptionFormat(
        tokenizer=model.tokenizer,
        image_size=size,
        max_tokens=stage.qformer.text_tokens if matching else stage.contrastive.text_tokens,
        first=(vocab,) if matching else (),
        last=(end_token(model.tokenizer, template_of(model)),),
        vocab_size=vocab,
    )


def pairs_of(
    model: VLM | MLLM,
    samples: Mapping[str, Sequence[Sample]],
    weights: Mapping[str, float],
    stage: StageConfig,
    engine: EngineConfig,
) -> Callable[[int], CaptionBatch]:
    """Return index -> pairs, a pure function, of the data's questions.

    Args:
        model: whose tokenizer and encoder the pairs are for.
        samples: task -> questions.
        weights: task -> weight; empty = captions where the data has any, else names.
        stage: of a kind in `PAIR_KINDS`.
        engine: its accumulation, with the launched ranks, makes a step.

    Raises:
        ValueError: a mixture of other tasks than `CAPTIONS`, or data without any of them.
    """
    form = format_of(model, stage)
    if wrong := [task for task in weights if task not in CAPTIONS]:
        raise ValueError(
            f"stage {stage.name!r}: answers to {', '.join(wrong)} do not describe an image; a mixture of kind "
            f"{stage.kind} has some of {', '.join(CAPTIONS)}"
        )
    chosen = dict(weights) or dict.fromkeys(("caption",) if samples.get("caption") else ("name",), 1.0)
    sampler = MixtureSampler(samples, chosen, batch_size=stage.batch_size, seed=stage.seed)
    step = engine.accumulation * launched_world_size()
    return lambda index: form.batch([form.read(sample) for sample in sampler.batch_samples(index)], index // step)
