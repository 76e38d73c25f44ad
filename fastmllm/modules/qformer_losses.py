"""BLIP-2's first stage (arXiv 2301.12597): a Q-Former learns from image-text pairs by contrast, matching, captioning.

Shapes: S pairs of a micro-batch, W pairs of a step (`qformer_step`), Q queries, D width, E feature width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.kernels.linear_cross_entropy import linear_cross_entropy
from fastmllm.modules.cached_gradients import CachedGradients, cache_gradients
from fastmllm.modules.layer_norm import LayerNorm
from fastmllm.modules.qformer import ImageTokens, PackedText, QFormer
from fastmllm.modules.qformer_step import Compared, Embedded, StepPairs
from fastmllm.modules.ranks import place


@dataclass(frozen=True, kw_only=True, slots=True)
class QFormerLosses:
    """The three losses of a batch, scalars in fp32 or wider; BLIP-2 trains on their sum."""

    itc: Tensor
    itm: Tensor
    itg: Tensor

    @property
    def total(self) -> Tensor:
        return self.itc + self.itm + self.itg


def max_similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Return the similarity (A, B) of images (A, Q, E) and texts (B, E): that of the query which is most alike."""
    return (images @ texts.t()).amax(1)


def contrastive_loss(image_to_text: Tensor, text_to_image: Tensor, same: Tensor, smoothing: float = 0.1) -> Tensor:
    """Contrast each pair with all others (ITC), both ways.

    Args:
        image_to_text: (S, W) logits of this rank's images.
        text_to_image: (S, W) logits of this rank's texts.
        same: (S, W) bool, true where both are of one image; at least the pair itself.
        smoothing: share of the target that is spread over all W.

    Returns:
        The mean of both cross-entropies.
    """
    targets = same / same.sum(1, keepdim=True)
    rows = [F.cross_entropy(logits, targets.to(logits), label_smoothing=smoothing)
            for logits in (image_to_text, text_to_image)]  # fmt: skip
    return (rows[0] + rows[1]) / 2


@torch.no_grad()
def hard_negatives(logits: Tensor, same: Tensor, uniform: Tensor) -> Tensor:
    """Draw one other pair for each row, with the probabilities that the softmax gives those that are not `same`.

    Args:
        logits: (S, W).
        same: (S, W) bool; these are never drawn.
        uniform: (S,) fp64 in [0, 1), which of them.

    Returns:
        (S,) int64, below W.

    Raises:
        ValueError: a row has no other pair (fewer than 2 pairs; on a CPU also: all of one image).
    """
    if logits.shape[1] < 2 or (same.is_cpu and bool(same.all(1).any())):
        raise ValueError(f"fastmllm::hard_negatives: a row of logits {tuple(logits.shape)} has no pair but its own")
    chances = logits.double().masked_fill(same, -torch.inf).softmax(1).cumsum(1)
    total = chances[:, -1:]
    # strictly below the total: then the first sum above the mark belongs to a pair that has a chance
    mark = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(chances, mark, right=True).squeeze(1)


class _CaptionHead(nn.Module):
    """BERT's prediction head, whose matrix is the embedding table, and its label-smoothed loss."""

    def __init__(self, table: nn.Parameter, norm_eps: float) -> None:
        super().__init__()
        vocab_size, width = table.shape
        self.transform = nn.Linear(width, width)
        self.norm = LayerNorm(width, norm_eps)
        self.weight = table
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, labels: Tensor, smoothing: float, divisor: Tensor | float | None) -> Tensor:
        hidden = self.norm(F.gelu(self.transform(hidden)))
        scored = labels != -100
        divisor = scored.sum().clamp(min=1) if divisor is None else divisor
        # the bias is one more column, of ones on the other side; eight keep rows aligned
        ones = F.pad(hidden.new_ones(len(hidden), 1), (0, 7))
        weight = torch.cat([self.weight, F.pad(self.bias[:, None], (0, 7))], 1)
        loss = linear_cross_entropy(torch.cat([hidden, ones], 1), weight, labels, divisor=divisor)
        # smoothed = CE + smoothing * (logit of the label - mean logit)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        label = labels.clamp(min=0)
        above = self.weight[label].to(wide) - self.weight.to(wide).mean(0)
        excess = (hidden.to(wide) * above).sum(1) + self.bias[label].to(wide) - self.bias.to(wide).mean()
        return loss + smoothing * torch.where(scored, excess, 0).sum() / divisor


class QFormerPretraining(nn.Module):
    """A Q-Former with what its first stage needs beside it: feature projections, matching head, caption head.

    Args:
        qformer: with text.
        feature_width: E.
        temperature: what the learned temperature starts from.
        smoothing: of the labels, in ITC and ITG.

    Equal to LAVIS' Blip2Qformer without dropout, with `image_ids` to its retrieval fine-tuning. Two things differ on
    more than one rank: features of other ranks carry gradients (there they are cut off, so that its gradient depends on
    the number of ranks), and negatives do not depend on how pairs lie on ranks. `itm_head` and the features are those
    of transformers' Blip2ForImageTextRetrieval.
    """

    def __init__(
        self, qformer: QFormer, *, feature_width: int = 256, temperature: float = 0.07, smoothing: float = 0.1
    ) -> None:
        super().__init__()
        config = qformer.config
        if not config.vocab_size or feature_width < 1 or temperature <= 0 or not 0 <= smoothing < 1:
            raise ValueError(
                f"QFormerPretraining: needs a Q-Former with text (vocab_size {config.vocab_size}), {feature_width=} >= "
                f"1, {temperature=} > 0 and {smoothing=} in [0, 1)"
            )
        self.qformer, self.smoothing = qformer, smoothing
        self.image_proj = nn.Linear(config.width, feature_width)
        self.text_proj = nn.Linear(config.width, feature_width)
        self.itm_head = nn.Linear(config.width, 2)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.caption_head = _CaptionHead(cast("nn.Parameter", qformer.word_embeddings.weight), config.norm_eps)

    def tie(self) -> None:
        """Make the caption head's matrix the embedding table again (after an assigning load)."""
        self.caption_head.weight = cast("nn.Parameter", self.qformer.word_embeddings.weight)

    def image_features(self, queries: Tensor) -> Tensor:
        """Return (S, Q, E) unit vectors of `encode_images`' (S * Q, D)."""
        return _unit(self.image_proj(queries)).unflatten(0, (-1, self.qformer.config.num_queries))

    def text_features(self, hidden: Tensor, text: PackedText) -> Tensor:
        """Return (S, E) unit vectors of `encode_text`'s (T, D): of the first row of each text, its [CLS]."""
        return _unit(self.text_proj(hidden.index_select(0, text.cu_seqlens[:-1].long())))

    def match(self, media: ImageTokens, text: PackedText) -> Tensor:
        """Return (P, 2) logits that text and image do not, or do, belong together: the mean over the queries."""
        logits = self.itm_head(self.qformer(media, text))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).unflatten(
            0, (media.start.numel(), self.qformer.config.num_queries)
        ).mean(1)  # fmt: skip

    def forward(
        self,
        media: ImageTokens,
        text: PackedText,
        *,
        bos_token_id: int,
        generator: torch.Generator,
        image_ids: Tensor | None = None,
        divisor: Tensor | float | None = None,
        compared: Compared | None = None,
    ) -> QFormerLosses:
        """Score a batch of pairs.

        Args:
            media: one image a pair.
            text: S captions, each with its [CLS] in front.
            bos_token_id: what stands in place of [CLS] where the caption is written.
            generator: of the CPU, in the same state on every rank; draws the negatives.
            image_ids: (S,) int64, equal for captions of one image, which are then no negatives; None: all differ.
            divisor: of ITG's sum over tokens; None for this batch's tokens. For a mean over ranks give the tokens of
                all ranks divided by their number.
            compared: of `compare`, where the batch is one of several of its step; negatives and ids are there.

        Returns:
            The losses, means over this rank's pairs; with `compared`, ITC over those of the step.

        Raises:
            ValueError: media and text differ in pairs, or there is no negative.
        """
        pairs = media.start.numel()
        if text.cu_seqlens.numel() != pairs + 1 or pairs < 1:
            raise ValueError(f"QFormerPretraining: {pairs} images for {text.cu_seqlens.numel() - 1} texts")
        queries, kept = self.qformer.encode_images(media, keep=True)
        images, texts = self.image_features(queries), self.text_features(self.qformer.encode_text(text), text)
        if compared is not None and compared.gradients is not None:
            itc = compared.gradients.apply((images, texts), (self.temperature,))
        else:
            here = self._embedded(images, texts, media, text, image_ids)
            step = StepPairs([here])
            same, logits = step.same(), _logits(step, images, texts, self.temperature)
            itc = contrastive_loss(*logits, same, self.smoothing)
            (compared,) = _compared(step, same, logits, generator, [None])
        # image and text of the pair, another image, another text
        matches = self.match(compared.shown_images(media), compared.shown_texts(text))
        labels = torch.arange(3 * pairs, device=matches.device) < pairs
        itm = F.cross_entropy(matches, labels.long())

        written, labels = _written(text, bos_token_id)
        hidden = self.qformer.encode_text(written, kept)
        return QFormerLosses(itc=itc, itm=itm, itg=self.caption_head(hidden, labels, self.smoothing, divisor))

    def embed(self, media: ImageTokens, text: PackedText, image_ids: Tensor | None = None) -> Embedded:
        """Return what `compare` takes of a micro-batch; arguments as `forward`. Call it without a graph."""
        queries, _ = self.qformer.encode_images(media)
        images, texts = self.image_features(queries), self.text_features(self.qformer.encode_text(text), text)
        return self._embedded(images, texts, media, text, image_ids)

    def compare(self, step: Sequence[Embedded], generator: torch.Generator) -> list[Compared]:
        """Contrast all pairs of a step, and draw for each a wrong image and a wrong text among them.

        Args:
            step: this rank's micro-batches.
            generator: as in `forward`.

        Returns:
            What each micro-batch's `forward` takes.
        """
        pairs, temperature = StepPairs(step), step[0].temperature
        same = pairs.same()

        def itc(images: Tensor, texts: Tensor, temperature: Tensor) -> Tensor:
            return contrastive_loss(*_logits(pairs, images, texts, temperature), same, self.smoothing)

        gradients = cache_gradients(itc, [(part.images, part.texts) for part in step], [temperature])
        images, texts = torch.cat([part.images for part in step]), torch.cat([part.texts for part in step])
        return _compared(pairs, same, _logits(pairs, images, texts, temperature), generator, gradients)

    def _embedded(
        self, images: Tensor, texts: Tensor, media: ImageTokens, text: PackedText, image_ids: Tensor | None
    ) -> Embedded:
        if image_ids is None:
            rank, pairs = place()[0], len(texts)
            image_ids = torch.arange(rank * pairs, (rank + 1) * pairs, device=texts.device)
        temperature = self.temperature.detach().clone()
        return Embedded(
            images=images, texts=texts, image_ids=image_ids, media=media, text=text, temperature=temperature
        )


def _logits(step: StepPairs, images: Tensor, texts: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (A * S, W) of this rank's images and of its texts."""
    image_to_text = max_similarity(images, step.all(texts)) / temperature
    return image_to_text, max_similarity(step.all(images), texts).t() / temperature


def _compared(
    step: StepPairs, same: Tensor, logits: tuple[Tensor, Tensor], generator: torch.Generator,
    gradients: Sequence[CachedGradients | None],
) -> list[Compared]:  # fmt: skip
    """Draw negatives; every pair's number decides what is drawn for it, wherever it lies."""
    own, image_to_text, text_to_image = torch.cat(step.own), *logits
    uniform = torch.rand(2, step.number, generator=generator, dtype=torch.float64)
    uniform = uniform.to(own.device, non_blocking=True)[:, own]
    other_image = hard_negatives(text_to_image, same, uniform[0]).split(step.each)
    other_text = hard_negatives(image_to_text, same, uniform[1]).split(step.each)
    shared: dict[str, Any] = {"images": step.images(), "texts": step.texts(), "written": step.written()}
    return [
        Compared(gradients=found, own=numbers, other_image=image, other_text=text, **shared)
        for found, numbers, image, text in zip(gradients, step.own, other_image, other_text, strict=True)
    ]


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _written(text: PackedText, bos_token_id: int) -> tuple[PackedText, Tensor]:
    """Return the captions behind the token that starts writing, and the next token of each row (-100 at the end)."""
    rows = torch.arange(len(text.ids), device=text.ids.device)
    bounds = F.pad(text.cu_seqlens, (0, 1), value=0)  # rows behind the last text end before they start
    mine = torch.searchsorted(text.cu_seqlens[1:].long(), rows, right=True)
    ids = torch.where(rows == bounds[mine], bos_token_id, text.ids)
    labels = torch.where(rows + 1 < bounds[mine + 1], text.ids.roll(-1), -100)
    return PackedText(ids=ids, cu_seqlens=text.cu_seqlens, max_seqlen=text.max_seqlen), labels
