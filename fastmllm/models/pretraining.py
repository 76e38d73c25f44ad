"""Models that learn from pairs of images and captions: two towers by contrast, and a Q-Former by BLIP-2's three losses.

Both are made of parts of another model, which they train in place. Their loss is the mean over this rank's pairs times
their number, so that divided by all pairs of a step it is that of one process with all of them.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fastmllm.models.contrastive import ClipLoss, SiglipLoss
from fastmllm.models.encoder import Encoder, segment_bounds
from fastmllm.models.language import LanguageModel
from fastmllm.models.roles import LANGUAGE, named_roles
from fastmllm.modules.qformer import ImageTokens, PackedText
from fastmllm.modules.qformer_losses import QFormerPretraining
from fastmllm.modules.ranks import gather, place

LOSSES = {"clip": ClipLoss, "siglip": SiglipLoss}


class Captions(Protocol):
    """What is read of a batch of pairs (`fastmllm.data.captions.CaptionBatch`)."""

    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (T,)
    cu_seqlens: Tensor  # (S + 1,)
    max_seqlen: int
    pixels: Tensor  # (S, H, W, C) uint8
    image_ids: Tensor  # (S,) int64
    draw: int


class DualEncoder(nn.Module):
    """An image tower and a text tower whose features of a pair are alike (CLIP, arXiv 2103.00020; SigLIP, 2303.15343).

    An image's feature is the projected mean of its tokens, a text's the projected last hidden state, where a causal
    decoder has read all of it.

    Args:
        vision: image tower.
        language: text tower; its head is not used.
        width: of the features.
        loss: "clip" or "siglip".
    """

    def __init__(self, vision: Encoder, language: LanguageModel, width: int = 256, loss: str = "clip") -> None:
        super().__init__()
        if loss not in LOSSES or width < 1:
            raise ValueError(f"DualEncoder: loss {loss!r} must be one of {', '.join(LOSSES)}, width ({width}) positive")
        self.vision, self.language = vision, language
        self.image_head = nn.Linear(vision.width, width, bias=False)
        self.text_head = nn.Linear(language.config.width, width, bias=False)
        self.loss = LOSSES[loss]()

    def roles(self) -> dict[str, tuple[str, ...]]:
        """Return role ("vision", "llm", "embeddings", "heads") -> names of its parameters; the scale is a head's."""
        heads = {"image_head.": "heads", "text_head.": "heads", "loss.": "heads"}
        return named_roles(self, {"vision.": "vision"} | heads | LANGUAGE)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return (S, D) of uint8 (S, H, W, 3)."""
        head = self.image_head.weight
        tokens = self.vision(pixels.to(head.device))  # (S, N, Dv)
        return self.image_head(tokens.mean(1).to(head.dtype))

    def text_features(self, batch: Captions) -> Tensor:
        """Return (S, D) of packed texts."""
        device = self.text_head.weight.device
        bounds = batch.cu_seqlens.to(device)
        hidden = self.language(
            self.language.embed(batch.input_ids.to(device)), batch.position_ids.to(device), bounds, batch.max_seqlen
        )
        return self.text_head(hidden.index_select(0, bounds[1:].long() - 1))

    def forward(self, batch: Captions) -> Tensor:
        """Return the loss of a batch of pairs, fp32; every rank brings equally many."""
        loss = self.loss(self.image_features(batch.pixels), self.text_features(batch))
        return loss.float() * len(batch.pixels)


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

    def forward(self, batch: Captions) -> Tensor:
        """Return the sum of the three losses, fp32; every rank brings equally many pairs and one `max_seqlen`."""
        weight = self.pretraining.image_proj.weight
        learns = any(param.requires_grad for param in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            tokens = self.vision(batch.pixels.to(weight.device)).to(weight.dtype)  # (S, N, Dv)
        pairs, each, _ = tokens.shape
        bounds, _ = segment_bounds([each] * pairs, weight.device)
        text = PackedText(
            ids=batch.input_ids.to(weight.device), cu_seqlens=batch.cu_seqlens.to(weight.device),
            max_seqlen=batch.max_seqlen,
        )  # fmt: skip
        # each caption's tokens, its [CLS] replaced by what starts writing: all but the first are predicted
        written = (text.cu_seqlens[-1:] - pairs).float()
        # not by its call: ZeRO-3 gathers in the backward pass for modules whose output is a tensor, as this one's is
        losses = self.pretraining.forward(
            ImageTokens.of_images(tokens.flatten(0, 1), bounds, each),
            text,
            bos_token_id=self.bos_token_id,
            generator=torch.Generator().manual_seed(batch.draw),
            image_ids=batch.image_ids.to(weight.device),
            divisor=(gather(written).sum() / place()[1]).clamp(min=1),
        )
        return cast(Tensor, losses.total).float() * pairs
