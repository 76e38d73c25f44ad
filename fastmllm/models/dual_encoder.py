"""Two towers that learn which image and caption belong together (CLIP, SigLIP); what is read of a batch of pairs.

A `DualEncoder` is made of parts of another model, which it trains in place. Its loss is the mean over this rank's pairs
times their number, so that divided by all pairs of a step it is that of one process with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fastmllm.models.contrastive import ClipLoss, PairLoss, SiglipLoss
from fastmllm.models.encoder import Encoder
from fastmllm.models.language import LanguageModel
from fastmllm.models.roles import LANGUAGE, named_roles
from fastmllm.modules.cached_gradients import CachedGradients, cache_gradients

LOSSES: dict[str, type[PairLoss]] = {"clip": ClipLoss, "siglip": SiglipLoss}


class Captions(Protocol):
    """What is read of a batch of pairs (`fastmllm.data.captions.CaptionBatch`)."""

    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (T,)
    cu_seqlens: Tensor  # (S + 1,)
    max_seqlen: int
    pixels: Tensor  # (S, H, W, C) uint8
    image_ids: Tensor  # (S,) int64
    draw: int


@dataclass(frozen=True, kw_only=True)  # no slots: ZeRO-3 looks into the `vars` of what a module returns
class Features:
    """What two towers make of a micro-batch, without a graph.

    Args:
        image, text: (S, D).
        seen: (S, Dv) of an image tower that does not learn, which needs to look once only; else None.
        scales: the loss's parameters, whole.
    """

    image: Tensor
    text: Tensor
    seen: Tensor | None
    scales: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Compared:
    """What a micro-batch learns once all pairs of its step were compared; `seen` as in `Features`."""

    gradients: CachedGradients
    seen: Tensor | None


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
        return self.image_head(self._look(pixels))

    def text_features(self, batch: Captions) -> Tensor:
        """Return (S, D) of packed texts."""
        device = self.text_head.weight.device
        bounds = batch.cu_seqlens.to(device)
        hidden = self.language(
            self.language.embed(batch.input_ids.to(device)), batch.position_ids.to(device), bounds, batch.max_seqlen
        )
        return self.text_head(hidden.index_select(0, bounds[1:].long() - 1))

    def forward(self, batch: Captions, compared: Compared | None = None, *, embed: bool = False) -> Tensor | Features:
        """Return the loss of a batch of pairs, fp32; every rank brings equally many.

        Args:
            batch: of pairs.
            compared: what `compare` found, where the batch is one of several of its step.
            embed: return the features instead, for `compare`.
        """
        seen = None if compared is None else compared.seen
        seen = self._look(batch.pixels) if seen is None else seen
        image, text = self.image_head(seen), self.text_features(batch)
        if embed:
            scales = tuple(value.detach().clone() for value in self.loss.scales())
            return Features(image=image, text=text, seen=None if learns(self.vision) else seen, scales=scales)
        loss = self.loss(image, text, cached=None if compared is None else compared.gradients)
        return loss.float() * len(batch.pixels)

    def compare(self, step: Sequence[Features]) -> list[Compared]:
        """Compare all pairs of a step, those of other ranks too; returns what each micro-batch's forward takes."""
        found = cache_gradients(self.loss.score, [(part.image, part.text) for part in step], step[0].scales)
        return [Compared(gradients, part.seen) for gradients, part in zip(found, step, strict=True)]

    def _look(self, pixels: Tensor) -> Tensor:
        """Return the mean of each image's tokens, (S, Dv); without graph where the tower does not learn."""
        weight = self.image_head.weight
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns(self.vision)):
            return self.vision(pixels.to(weight.device)).mean(1).to(weight.dtype)


def learns(module: nn.Module) -> bool:
    """Tell whether any parameter of a module is trained."""
    return any(param.requires_grad for param in module.parameters())
