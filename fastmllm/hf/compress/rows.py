"""Rows of text whose images lose tokens: which column of the text each column that is left was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

PAD = -1  # a column that none of the text was


@dataclass(frozen=True, slots=True)
class Images:
    """The visual tokens of a batch, one entry a run of placeholders.

    Args:
        before: placeholders of each in the text.
        after: tokens that are left of each.
        pos: (sum of after,) int64 which placeholder of its image each stands at; None: the last ones.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    pos: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What is left of the columns of a batch.

    Args:
        index: (B, T') int64 the column that each was, PAD for none; behind a cache, counted from the cache's first one.
            Of the placeholders of an image, which are all alike, these are the last: text behind it is predicted there.
        stands: as `index`, with the placeholders in whose places the tokens stand.
        columns: T, of the text that is new.
        past: columns of the text that are in the cache, of which `cached` (B, P) int64 are left.
        owners: the row of each image.
        behind: columns that are left up to the last placeholder, the cache's included.
    """

    index: Tensor
    stands: Tensor
    columns: int
    past: int = 0
    cached: Tensor | None = None
    owners: tuple[int, ...] = ()
    behind: int = 0

    @property
    def whole(self) -> Tensor:
        """(B, P + T') as `index`, the cache's columns in front."""
        return self.index if self.cached is None else torch.cat([self.cached, self.index], 1)

    def take(self, plane: Tensor, fill: int) -> Tensor:
        """Return what is left of (..., B, T), or of the cache's columns and these; `fill` where there was none.

        Raises:
            ValueError: it has another number of columns.
        """
        if plane.shape[-1] == self.past + self.columns:
            index = self.whole
        elif plane.shape[-1] == self.columns:
            index = torch.where(self.index == PAD, PAD, self.index - self.past)
        else:
            raise ValueError(
                f"compress: a tensor of shape {tuple(plane.shape)} goes with neither the {self.columns} tokens of the "
                f"call nor the {self.past + self.columns} of the conversation"
            )
        return self._gather(plane, index, fill)

    @staticmethod
    def _gather(plane: Tensor, index: Tensor, fill: int) -> Tensor:
        shape = (*plane.shape[:-2], *index.shape)
        taken = plane.expand(*shape[:-1], plane.shape[-1]).gather(-1, index.clamp(min=0).expand(shape))
        return taken.masked_fill(index == PAD, fill)

    def standing(self, positions: Tensor) -> Tensor:
        """Return (..., B, T') of positions (..., B, T) those where tokens stand, 0 where there is none."""
        return self._gather(positions, torch.where(self.stands == PAD, PAD, self.stands - self.past), 0)

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """Return the attention mask of what is left, over the cache's columns too; None where nothing is masked."""
        if mask is not None and mask.shape[-1] == self.past + self.columns:
            return self.take(mask, 0)
        whole = self.whole
        if mask is None:
            return None if not bool((whole == PAD).any()) else (whole != PAD).long()
        cached = 0 if self.cached is None else self.cached.shape[1]
        if mask.shape[-1] == cached + self.columns:  # the caller has counted what the cache holds
            return torch.cat([mask[:, :cached], self.take(mask[:, cached:], 0)], 1)
        return self.take(mask, 0)  # says what does not fit

    def spread(self, x: Tensor) -> Tensor:
        """Return (B, T, C) of (B, T', C): each column of the text has its own again, and 0 those that are gone."""
        index = torch.where(self.index == PAD, PAD, self.index - self.past) + 1
        order = torch.arange(x.shape[1], device=index.device).expand_as(index)
        source = index.new_full((len(index), self.columns + 1), PAD).scatter_reduce(1, index, order, "amax")[:, 1:]
        return self._gather(x.permute(2, 0, 1), source, 0).permute(1, 2, 0)

    def renumbered(self, position_ids: Tensor) -> Tensor:
        """Return (B, T') positions of which those behind an image close up, as each packed text counts them."""
        position_ids = position_ids.expand(len(self.index), -1)
        lost = pad(torch.ones_like(position_ids), (1, 0)).scatter_(1, self.index + 1, 0)  # PAD is in front
        lost = lost.cumsum(1)[:, :-1]  # in front of each column
        first = (torch.arange(self.columns, device=lost.device) - position_ids).clamp(min=0)
        return self.take(position_ids - lost + lost.gather(1, first), 0)


def places_of(ids: Tensor, token: int, images: Images) -> Tensor:
    """Return (P,) int64 where in (B, T) on the host, flat, placeholders stand.

    Raises:
        ValueError: they are not as many as the images have.
    """
    places = (ids == token).flatten().nonzero().flatten()
    if sum(images.before) != len(places):
        raise ValueError(
            f"compress: image features and image tokens do not match, tokens: {len(places)}, features: "
            f"{sum(images.before)} of images of {images.before[:8]}"
        )
    return places


def shorten(
    ids: Tensor, token: int, images: Images, *, mask: Tensor | None, left: bool, past: int = 0,
    cached: Tensor | None = None,
) -> Rows:  # fmt: skip
    """Say what is left of rows of text.

    Args:
        ids: (B, T) of the text that is new.
        token: the id of a placeholder.
        images: in the order of their placeholders.
        mask: (B, T) 0 where the text is padded, or None.
        left: rows are padded in front.
        past: columns of the text in front of these, which are in a cache.
        cached: (B, P) what is left of those.

    Raises:
        ValueError: placeholders and images do not fit.
    """
    device, (batch, columns) = ids.device, ids.shape
    host = ids.cpu()  # the one wait: how long rows become is what the text says
    seen = (host == token).flatten() & bool(images.before)  # without an image, words that were said: read as such
    places = places_of(host, token, images) if images.before else seen.nonzero().flatten()
    before, after = (torch.tensor(n, dtype=torch.int64) for n in (images.before, images.after))
    starts = before.cumsum(0) - before
    owners = torch.div(places[starts], columns, rounding_mode="floor")
    if bool((owners != torch.div(places[starts + before - 1], columns, rounding_mode="floor")).any()):
        raise ValueError("compress: the placeholders of an image are spread over two rows")
    inside = torch.arange(len(places)) - starts.repeat_interleave(before)
    count = torch.ones(batch * columns, dtype=torch.int64) if mask is None else (mask.cpu() != 0).flatten().long()
    count[places] = (inside >= (before - after).repeat_interleave(before)).long()
    more = (after - before).clamp(min=0)  # tiles keep more than the text had places for
    count[places[starts + before - 1]] += more
    lengths = count.view(batch, columns).sum(1)
    longest = int(lengths.max())
    source = torch.arange(batch * columns).repeat_interleave(count)
    row = torch.div(source, columns, rounding_mode="floor")
    column = torch.arange(len(source)) - (lengths.cumsum(0) - lengths)[row]
    at = row * longest + column + ((longest - lengths)[row] if left else 0)
    index = torch.full((batch * longest,), PAD, dtype=torch.int64)
    index[at] = source % columns + past
    index = index.to(device, non_blocking=True)
    slots = at[seen[source]]
    behind = 0 if not len(slots) else int((slots % longest).max()) + 1 + (0 if cached is None else cached.shape[1])
    stands = index
    if images.pos is not None and len(images.pos):
        run = places % columns + past
        beginning = starts.repeat_interleave(after).to(device, non_blocking=True)
        taken = run.to(device, non_blocking=True)[beginning + images.pos.to(device)]
        stands = index.index_copy(0, slots.to(device, non_blocking=True), taken)
    return Rows(
        index=index.view(batch, longest), stands=stands.view(batch, longest), columns=columns, past=past, cached=cached,
        owners=tuple(owners.tolist()), behind=behind,
    )  # fmt: skip
