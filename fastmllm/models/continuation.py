"""How a batch goes on behind what its cache holds: the positions of later tokens, and what they see of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmllm.models.kv_cache import KVCache
from fastmllm.models.language import LanguageModel
from fastmllm.models.media import Media


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """Continue the sequences of a batch.

    Args:
        language: the decoder.
        media: what the last row of each sequence sees across, or None.
        cu_seqlens: (S + 1,) int32 of the hidden states, where visual tokens were dropped between layers, or None.
    """

    language: LanguageModel
    media: Media | None = None
    cu_seqlens: Tensor | None = None

    def extend(self, tokens: Tensor, counts: Sequence[int], cache: KVCache) -> Tensor:
        """Run further tokens of every sequence.

        Args:
            tokens: (T,) of all sequences, packed.
            counts: how many are each sequence's.
            cache: of these sequences; the tokens are added.

        Returns:
            (T, D) hidden states after the final norm.
        """
        device = tokens.device
        lengths = torch.tensor(cache.next_positions)
        if all(n == 1 for n in counts):
            positions, owners, starts = lengths, None, torch.arange(len(counts) + 1)
        else:
            owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
            starts = torch.tensor([0, *counts]).cumsum(0)
            positions = lengths[owners] + torch.arange(len(owners)) - starts[owners]
        media = self.media
        if media is not None and owners is not None:
            media = media.at(owners.to(device))
        return self.language(
            self.language.embed(tokens), positions.to(device), starts.to(device=device, dtype=torch.int32), max(counts),
            cache, media=media,
        )  # fmt: skip

    def select(self, rows: Sequence[int]) -> Continuation:
        """Take some sequences, in this order and as often as named; images are shared, not copied."""
        index = torch.tensor(list(rows))
        media = None if self.media is None else self.media.at(index.to(self.media.start.device))
        return replace(self, media=media)
