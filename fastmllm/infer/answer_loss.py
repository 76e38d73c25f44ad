"""How unlikely a model finds the answers of samples: what cleaning looks for outliers in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastmllm.data.conversation import PLACEHOLDER
from fastmllm.data.images import ImageError
from fastmllm.data.sample import Conversation, Sample
from fastmllm.data.shard_index import Skipped
from fastmllm.data.shards import ShardSource
from fastmllm.data.text import TextError
from fastmllm.data.turns import images_of
from fastmllm.infer.respond import collate_for
from fastmllm.models.inputs import IGNORE, Inputs
from fastmllm.models.mllm import MLLM
from fastmllm.models.vlm import VLM


class AnswerLoss:
    """Score conversations by the nats of their answers' tokens, ends included.

    Args:
        model: with its own tokens an image and image size, or its resolution policy.
    """

    def __init__(self, model: VLM | MLLM) -> None:
        self.model = model

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample] | Sequence[Conversation]) -> list[float]:
        """Return the mean a token of each sample.

        Raises:
            TextError, ImageError: a sample that cannot be read.
        """
        cached = isinstance(self.model, VLM) and _has_features(self.model, samples)
        batch = collate_for(self.model, samples, load_pixels=not cached, with_answers=True)
        totals = self.model.log_probs(batch).tolist()
        labels = batch.plan.labels if isinstance(batch, Inputs) else batch.labels
        scored = labels.ne(IGNORE).long().cumsum(0)  # type: ignore[union-attr]
        ends = torch.cat([scored.new_zeros(1), scored])[batch.cu_seqlens.long()]  # (S + 1,)
        return [-total / max(1, count) for total, count in zip(totals, ends.diff().tolist(), strict=True)]


def _has_features(model: VLM, samples: Sequence[Sample] | Sequence[Conversation]) -> bool:
    cache = model.feature_cache
    if cache is None or cache.image_size != model.config.image_size:
        return False
    return all(image in cache.features for sample in samples for image in images_of(sample))


def answer_losses(
    source: ShardSource, loss: AnswerLoss, *, batch_size: int = 16, blind: bool = True
) -> Iterator[dict[str, Any] | Skipped]:
    """Yield {shard, key, loss, blind} of each sample, as `clean` reads them, and what could not be scored.

    Args:
        source: what to go through.
        loss: scores.
        batch_size: samples at a time.
        blind: score answers without images, too.
    """
    for number, shard in enumerate(source.shards):
        for start in range(0, source.sizes[number], batch_size):
            places = range(start, min(start + batch_size, source.sizes[number]))
            read = [(source.located(number, place).key, source.sample(number, place)) for place in places]
            yield from _scored(str(shard), read, loss, blind)


def _scored(
    shard: str, read: Sequence[tuple[str, Conversation | Skipped]], loss: AnswerLoss, blind: bool
) -> Iterable[dict[str, Any] | Skipped]:
    good = [(key, sample) for key, sample in read if isinstance(sample, Conversation)]
    out: list[dict[str, Any] | Skipped] = [sample for _, sample in read if isinstance(sample, Skipped)]
    if not good:
        return out
    try:
        seen = loss([sample for _, sample in good])
        unseen = loss([_without_images(sample) for _, sample in good]) if blind else [None] * len(good)
    except (TextError, ImageError) as error:
        if len(good) == 1:
            return [*out, Skipped(shard=shard, key=good[0][0], reason="cannot be scored", detail=str(error))]
        return [*out, *(row for one in good for row in _scored(shard, [one], loss, blind))]
    rows = zip(good, seen, unseen, strict=True)
    return [*out, *({"shard": shard, "key": key, "loss": value, "blind": other} for (key, _), value, other in rows)]


def _without_images(sample: Conversation) -> Conversation:
    turns = tuple(replace(turn, prompt=turn.prompt.replace(PLACEHOLDER, "").strip() or "?") for turn in sample.turns)
    return replace(sample, turns=turns, images=())
