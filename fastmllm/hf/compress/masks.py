"""What rows that are left see of each other: the model's own mask without the columns that are gone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmllm.hf.compress.rows import PAD


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Return (B, T', D) of (B or 1, T, D): the columns that an index (B, T') names, the first one for PAD."""
    return x.expand(len(index), -1, -1).gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))


def mask_of(
    mask: Tensor | None, queries: Tensor, keys: Tensor, total: int, *, flash: bool, padded: bool,
    bias: Tensor | None = None, dtype: torch.dtype = torch.float32,
) -> Tensor | None:  # fmt: skip
    """Take columns out of an attention mask.

    Args:
        mask: as the text model gives it to its layers: (B or 1, 1 or H, T, N) bool or added to scores, (B, N) where
            `flash`, or None: nothing but causal. Its N columns are the last ones of cache and text.
        queries: (B, T') column of each row that is left, PAD for none.
        keys: (B, N') the same of what keys there are, the cache's first.
        total: columns of cache and text.
        flash: the layers take (B, N') or None.
        padded: there are PADs among the keys.
        bias: (B, N') added to the scores of each key.
        dtype: of the queries.

    Returns:
        The mask of what is left. A row that is none sees itself.
    """
    if flash:
        if mask is None:
            return (keys != PAD).long() if padded else None
        first = total - mask.shape[1]
        return mask.gather(1, (keys - first).clamp(min=0)) * (keys >= max(first, 0))
    rows, columns = queries.shape[1], keys.shape[1]
    if mask is None and not padded and bias is None and (rows == columns or rows == 1):
        return None
    there = ((keys != PAD)[:, None] & (queries != PAD)[..., None])[:, None]
    if mask is None:
        seen = (keys[:, None] <= queries[..., None])[:, None]
    else:
        first = total - mask.shape[3]  # a sliding window's cache has let go of the columns in front
        at = (queries - (total - mask.shape[2])).clamp(min=0)[:, None, :, None]
        seen = mask.expand(len(keys), -1, -1, -1)
        seen = seen.gather(2, at.expand(-1, seen.shape[1], -1, seen.shape[3]))
        which = (keys - first).clamp(min=0)[:, None, None]
        seen = seen.gather(3, which.expand(-1, seen.shape[1], rows, -1))
        there = there & (keys >= first)[:, None, None]
    itself = torch.ones(rows, columns, dtype=torch.bool, device=keys.device).tril(columns - rows).triu(columns - rows)
    itself = (itself & (queries == PAD)[..., None])[:, None]
    if seen.dtype == torch.bool:
        seen = (seen & there) | itself
        if bias is None:
            return seen
        return torch.where(seen, bias[:, None, None].to(dtype), torch.finfo(dtype).min)
    seen = seen.masked_fill(~there, torch.finfo(seen.dtype).min).masked_fill(itself, 0)
    return seen if bias is None else seen + bias[:, None, None].to(seen.dtype)
