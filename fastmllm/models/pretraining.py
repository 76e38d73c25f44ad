"""A Q-Former learns from pairs of images and captions, by BLIP-2's three losses.

It is made of parts of another model, which it trains in place; its loss is weighed as a `DualEncoder`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastmllm.models.dual_encoder import Captions, learns
from fastmllm.models.encoder import Encoder, segment_bounds
from fastmllm.models.roles import named_roles
from fastmllm.modules.qformer import ImageTokens, PackedText
from fastmllm.modules.qformer_losses import QFormerPretraining
from fastmllm.modules.qformer_step import Compared, Embedded
from fastmllm.modules.ranks import gather, place


@dataclass(frozen=True, kw_only=True)  # no slots: ZeRO-3 looks into the `vars` of what a module returns
class SeenPairs:
    """What a Q-Former's micro-batch brings to a comparison; `draw` is the batch's."""

    pairs: Embedded
    draw: int


@dataclass(frozen=True, slots=True)
class ComparedPairs:
    """What a micro-batch learns and is shown; its image tokens, which the frozen tower need not make again."""

    pairs: Compared
    media: ImageTokens


class QFormerStage(nn.Module):
    """A Q-Former behind an image tower in BLIP-2's first stage: contrast, matching, captioning (arXiv 2301.12597).

    Args:
        vision: image tower, without graph where it does not learn.
        pretraining: the Q-Former and its heads.
        bos_token_id: starts a caption that is written.
    """

    def __init__(self, vision: Encoder, pretraining: QFormerPretraining, bos_token_id: int) -> None:
        super().__init__()
        self.vision, self.pretraining, self.bos_token_id = vision, pretraining, bos_token_id

    def roles(self) -> dict[str, tuple[str, ...]]:
        """Return role ("vision", "connector", "heads") -> names of its parameters; the Q-Former is the connector."""
        parts = {"vision.": "vision", "pretraining.": "heads", "pretraining.qformer.": "connector"}
        # the caption head's matrix is the Q-Former's embedding table
        return named_roles(self, parts | {"pretraining.caption_head.weight": "connector"})

    def forward(
        self, batch: Captions, compared: ComparedPairs | None = None, *, embed: bool = False
    ) -> Tensor | SeenPairs:
        """Return the sum of the three losses, fp32; every rank brings equally many pairs and one `max_seqlen`.

        Args:
            batch: of pairs.
            compared: what `compare` found, where the batch is one of several of its step.
            embed: return what is compared instead, for `compare`.

        Raises:
            ValueError: the tower learns, and several micro-batches make a step.
        """
        weight = self.pretraining.image_proj.weight
        media = None if compared is None else compared.media
        media = self._look(batch, weight) if media is None else media
        text = PackedText(
            ids=batch.input_ids.to(weight.device), cu_seqlens=batch.cu_seqlens.to(weight.device),
            max_seqlen=batch.max_seqlen,
        )  # fmt: skip
        image_ids, pairs = batch.image_ids.to(weight.device), len(batch.pixels)
        if embed:
            if learns(self.vision):
                raise ValueError(
                    "QFormerStage: pairs are matched with images of other micro-batches, through which a tower that "
                    "learns gets no gradient: freeze vision, or set engine.accumulation=1 with a larger batch_size"
                )
            return SeenPairs(pairs=self.pretraining.embed(media, text, image_ids), draw=batch.draw)
        # each caption's tokens, its [CLS] replaced by what starts writing: all but the first are predicted
        written = gather((text.cu_seqlens[-1:] - pairs).float()).sum() / place()[1] if compared is None else None
        divisor = written if compared is None else compared.pairs.written
        assert divisor is not None
        # not by its call: ZeRO-3 gathers in the backward pass for modules whose output is a tensor, as this one's is
        losses = self.pretraining.forward(
            media,
            text,
            bos_token_id=self.bos_token_id,
            generator=_drawing(batch.draw),
            image_ids=image_ids,
            divisor=divisor.clamp(min=1),
            compared=None if compared is None else compared.pairs,
        )
        return cast(Tensor, losses.total).float() * pairs

    def compare(self, step: Sequence[SeenPairs]) -> list[ComparedPairs]:
        """Compare all pairs of a step, those of other ranks too; returns what each micro-batch's forward takes."""
        found = self.pretraining.compare([part.pairs for part in step], _drawing(step[0].draw))
        return [ComparedPairs(pairs, part.pairs.media) for pairs, part in zip(found, step, strict=True)]

    def _look(self, batch: Captions, weight: Tensor) -> ImageTokens:
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns(self.vision)):
            tokens = self.vision(batch.pixels.to(weight.device)).to(weight.dtype)  # (S, N, Dv)
        pairs, each, _ = tokens.shape
        return ImageTokens.of_images(tokens.flatten(0, 1), segment_bounds([each] * pairs, weight.device)[0], each)


def _drawing(draw: int) -> torch.Generator:
    """Return what negatives are drawn with, the same on all ranks."""
    return torch.Generator().manual_seed(draw)
