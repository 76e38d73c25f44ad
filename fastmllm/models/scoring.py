"""What a model of images and text is asked for in training: the loss of a packed batch, or how probable answers are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.compression.reduction import IGNORED
from fastmllm.models.language import LanguageModel


class Scored(nn.Module):
    """A model whose answers can be scored; logits of other rows are never computed.

    Attributes:
        language: the decoder, with its head.
    """

    language: LanguageModel

    def scored(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run a batch: hidden states (T', D), labels (T',) and boundaries (S + 1,) of the rows that are left of it."""
        raise NotImplementedError

    def forward(self, batch: Any) -> Tensor:
        """Return the loss of a packed batch: the fp32 sum of cross-entropy over its target tokens."""
        hidden, labels, _ = self.scored(batch)
        return self.language.lm_head(hidden, labels, batch.num_targets)

    def log_probs(self, batch: Any) -> Tensor:
        """Return the log-probability of each sequence's labels, (S,) fp32."""
        hidden, labels, cu_seqlens = self.scored(batch)
        return self.language.lm_head(hidden, labels, batch.num_targets, cu_seqlens=cu_seqlens)

    def target_log_probs(self, batch: Any) -> Tensor:
        """Return the log-probability of each scored token, (num_targets,) fp32, in their order."""
        hidden, labels, _ = self.scored(batch)
        losses = self.language.lm_head(hidden, labels, batch.num_targets, reduction="none")
        rows = torch.nonzero_static(labels != IGNORED, size=batch.num_targets).view(-1)
        return -losses.index_select(0, rows)
