"""The pairs of a step in BLIP-2's first stage: which there are, and the wrong images and texts that each is shown.

Shapes: S pairs of each of A micro-batches on each of R ranks, W = A * R * S in all, numbered by micro-batch, then rank,
then pair; Q queries, E feature width. All micro-batches bring equally many pairs and the same `max_tokens` and
`max_seqlen`; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.modules.cached_gradients import CachedGradients
from fastmllm.modules.qformer import ImageTokens, PackedText
from fastmllm.modules.ranks import gather, place


@dataclass(frozen=True, kw_only=True)  # no slots: ZeRO-3 looks into the `vars` of what a module returns
class Embedded:
    """A micro-batch, ready to be compared.

    Args:
        images: (S, Q, E) unit vectors.
        texts: (S, E) unit vectors.
        image_ids: (S,) int64, equal for captions of one image.
        media: its image tokens.
        text: its captions.
        temperature: of the logits, a scalar.
    """

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    media: ImageTokens
    text: PackedText
    temperature: Tensor


@dataclass(frozen=True, slots=True)
class Joined:
    """Segments of all W pairs: rows in one buffer, and each pair's first row and length, (W,) int64."""

    rows: Tensor
    start: Tensor
    length: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """What a micro-batch learns, and is shown, once the pairs of its step were compared.

    Args:
        gradients: of the contrast, for a micro-batch that makes its features again; None where they are at hand.
        own: (S,) int64 numbers of its pairs.
        other_image, other_text: (S,) int64 numbers of pairs with another image.
        images, texts: of all pairs.
        written: tokens to be written in the step, divided by A * R.
    """

    gradients: CachedGradients | None
    own: Tensor
    other_image: Tensor
    other_text: Tensor
    images: Joined
    texts: Joined
    written: Tensor

    def shown_images(self, media: ImageTokens) -> ImageTokens:
        """Return what 3 S pairs see: their image, another one, their image again. Images at hand stay in place."""
        pairs, longest, here = media.start.numel(), media.max_tokens, len(media.tokens)
        start, length = self.images.start[self.other_image], self.images.length[self.other_image]
        rows = start[:, None] + torch.arange(longest, device=start.device)
        # what is too much nobody sees
        tokens = self.images.rows.index_select(0, rows.flatten().clamp(max=len(self.images.rows) - 1))
        first = here + torch.arange(pairs, device=start.device) * longest
        return ImageTokens(
            tokens=torch.cat([media.tokens, tokens]),
            start=torch.cat([media.start, first.int(), media.start]),
            stop=torch.cat([media.stop, (first + length).int(), media.stop]),
            max_tokens=longest,
        )

    def shown_texts(self, text: PackedText) -> PackedText:
        """Return 3 S texts: each twice, then another one; rows behind the last are padding."""
        pairs = text.cu_seqlens.numel() - 1
        which = torch.cat([self.own, self.own, self.other_text])
        start, length, ids = self.texts.start[which], self.texts.length[which], self.texts.rows
        cu_seqlens = F.pad(length.cumsum(0), (1, 0))
        rows = torch.arange(2 * len(text.ids) + pairs * text.max_seqlen, device=ids.device)
        mine = torch.searchsorted(cu_seqlens[1:], rows, right=True).clamp(max=3 * pairs - 1)
        ids = ids[(start[mine] + rows - cu_seqlens[mine]).clamp(max=len(ids) - 1)]
        return PackedText(ids=ids, cu_seqlens=cu_seqlens.int(), max_seqlen=text.max_seqlen)


class StepPairs:
    """Number the pairs of a step.

    Args:
        step: this rank's micro-batches.
    """

    def __init__(self, step: Sequence[Embedded]) -> None:
        self.step, (self.rank, self.ranks) = step, place()
        self.each = len(step[0].image_ids)
        pairs = torch.arange(self.each, device=step[0].image_ids.device)
        self.own = [(micro * self.ranks + self.rank) * self.each + pairs for micro in range(len(step))]  # (S,) each
        self.number = len(step) * self.ranks * self.each  # W

    def all(self, x: Tensor) -> Tensor:
        """Bring rows of this rank's micro-batches, (A * S, ...), into the order of all pairs, (W, ...)."""
        joined, micro = gather(x), len(self.step)
        return (
            joined if micro == 1 else joined.unflatten(0, (self.ranks, micro, self.each)).transpose(0, 1).flatten(0, 2)
        )

    def same(self) -> Tensor:
        """Tell which pairs are of one image: (A * S, W) bool."""
        ids = torch.cat([part.image_ids for part in self.step])
        return ids[:, None] == self.all(ids)[None]

    def images(self) -> Joined:
        """Join the image tokens."""
        media = [part.media for part in self.step]
        capacity = max(self.each * media[0].max_tokens, 1)
        return self._join([m.tokens for m in media], [(m.start, m.stop) for m in media], capacity)

    def texts(self) -> Joined:
        """Join the captions."""
        texts = [part.text for part in self.step]
        bounds = [(text.cu_seqlens[:-1], text.cu_seqlens[1:]) for text in texts]
        return self._join([text.ids for text in texts], bounds, self.each * texts[0].max_seqlen)

    def written(self) -> Tensor:
        """Return the tokens of all captions but each one's first, divided by A * R."""
        ends = torch.stack([part.text.cu_seqlens[-1:] for part in self.step])  # (A, 1)
        return gather((ends - self.each).float()).sum() / (self.ranks * len(self.step))

    def _join(self, parts: Sequence[Tensor], bounds: Sequence[tuple[Tensor, Tensor]], capacity: int) -> Joined:
        """Join buffers, brought to `capacity` rows each: rows behind a buffer's last are padding."""
        single = self.ranks == len(parts) == 1
        rows = parts[0] if single else torch.cat([gather(_filled(part, capacity)) for part in parts])
        before = torch.arange(self.ranks * len(parts), device=rows.device).repeat_interleave(self.each) * capacity
        start, stop = (torch.cat([gather(pair[side].long()) for pair in bounds]) for side in (0, 1))
        return Joined(rows, start + before, stop - start)


def _filled(x: Tensor, capacity: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, capacity - len(x)))  # a negative number cuts
