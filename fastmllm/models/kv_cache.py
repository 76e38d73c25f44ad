"""Keys and values of the tokens already seen, for generation and for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSlots:
    """Where one packed call reads and writes; built once a call, used by every layer."""

    counts: list[int]  # new tokens of each sequence, host
    rows: Tensor  # (T,) int64: the sequence of each packed token
    offsets: Tensor  # (T,) int64: its place among the new tokens of that sequence
    columns: Tensor  # (T,) int64: its place in the cache
    limit: int  # columns in use once these tokens are in
    mask: Tensor | None  # (B, 1, max(counts), limit) bool, True = attend; None when the cache was empty
    window_mask: Tensor | None  # the same for layers with a sliding window; `mask` itself where the window is not full


class KVCache:
    """Hold padded keys and values (B, Hkv, Lmax, Dh) a layer, with the true lengths on the host.

    Args:
        depth: decoder layers.
        batch: sequences B.
        num_kv_heads: key heads Hkv.
        head_dim: width Dh of one head.
        max_length: tokens Lmax that a row can hold.
        dtype: of keys and values.
        device: of keys and values.

    Attributes:
        lengths: tokens in each row.
        next_positions: position of each row's next text token; differs from `lengths` behind images with M-RoPE.
    """

    def __init__(
        self,
        *,
        depth: int,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(depth, batch, num_kv_heads, head_dim, max_length) < 1:
            raise ValueError(f"fastmllm::KVCache: every size must be positive, got batch {batch}, length {max_length}")
        shape = (batch, num_kv_heads, max_length, head_dim)
        # zeros, not empty: a masked column still meets probability 0, and 0 x NaN is NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(depth)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(depth)]
        self.lengths = [0] * batch
        self.next_positions = [0] * batch

    @property
    def max_length(self) -> int:
        """Tokens that a row can hold."""
        return self.keys[0].shape[2]

    def reserve(self, counts: Sequence[int], window: int | None = None) -> CacheSlots:
        """Place the next tokens of every sequence; the lengths move on when `advance` is called.

        Args:
            counts: new tokens of each sequence, every one >= 1.
            window: tokens that a row of a sliding-window layer sees, itself included.

        Returns:
            The slots for `write`.

        Raises:
            ValueError: another number of sequences, a sequence without a new token, or a full row.
        """
        counts = list(counts)
        if len(counts) != len(self.lengths):
            raise ValueError(f"fastmllm::KVCache: {len(counts)} sequences for a cache of {len(self.lengths)}")
        if min(counts) < 1:
            raise ValueError(f"fastmllm::KVCache: sequence {counts.index(min(counts))} brings no new token")
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        if max(ends) > self.max_length:
            raise ValueError(
                f"fastmllm::KVCache: {max(ends)} tokens do not fit into max_length {self.max_length}; "
                "make the cache longer (prompt + max_new_tokens) or shorten the prompt"
            )
        device = self.keys[0].device
        width = max(counts)
        offsets = torch.cat([torch.arange(count) for count in counts])  # (T,)
        rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))  # (T,)
        starts = torch.tensor(self.lengths)
        mask = window_mask = None
        if any(self.lengths):
            seen = (starts[:, None] + torch.arange(width))[:, None, :, None]  # last column that query j may see
            columns = torch.arange(max(ends))
            mask = columns <= seen  # (B, 1, n, limit)
            if window is not None and max(ends) > window:
                window_mask = (mask & (columns > seen - window)).to(device, non_blocking=True)
            mask = mask.to(device, non_blocking=True)
        return CacheSlots(
            counts=counts,
            rows=rows.to(device, non_blocking=True),
            offsets=offsets.to(device, non_blocking=True),
            columns=(starts[rows] + offsets).to(device, non_blocking=True),
            limit=max(ends),
            mask=mask,
            window_mask=mask if window_mask is None else window_mask,
        )

    def write(self, layer: int, key: Tensor, value: Tensor, slots: CacheSlots) -> tuple[Tensor, Tensor]:
        """Store the new tokens of one layer.

        Args:
            layer: index of the layer.
            key: (T, Hkv, Dh) packed, positions already applied.
            value: (T, Hkv, Dh) packed.
            slots: from `reserve`.

        Returns:
            Keys and values so far, (B, Hkv, limit, Dh) each; views.
        """
        keys, values = self.keys[layer], self.values[layer]
        keys[slots.rows, :, slots.columns] = key.to(keys.dtype)
        values[slots.rows, :, slots.columns] = value.to(values.dtype)
        return keys[:, :, : slots.limit], values[:, :, : slots.limit]

    def advance(self, slots: CacheSlots, next_positions: Sequence[int] | None = None) -> None:
        """Count the tokens of `slots` as seen; call it once, after the last layer.

        Args:
            slots: from `reserve`.
            next_positions: of each row; None: every new token took one position.
        """
        self.lengths = [length + count for length, count in zip(self.lengths, slots.counts, strict=True)]
        if next_positions is None:
            next_positions = [place + count for place, count in zip(self.next_positions, slots.counts, strict=True)]
        self.next_positions = list(next_positions)

    def select(self, rows: Sequence[int], max_length: int | None = None) -> KVCache:
        """Copy some sequences, in this order and as often as named.

        Args:
            rows: sequences to take; a repeated row shares nothing with its twin.
            max_length: room a row in the copy; as here if None.

        Returns:
            A new cache.

        Raises:
            ValueError: no row, or a row longer than `max_length`.
        """
        if not rows:
            raise ValueError("fastmllm::KVCache: select needs at least one row")
        lengths = [self.lengths[row] for row in rows]
        room = self.max_length if max_length is None else max_length
        if max(lengths) > room:
            raise ValueError(f"fastmllm::KVCache: {max(lengths)} cached tokens do not fit into max_length {room}")
        _, num_kv_heads, _, head_dim = self.keys[0].shape
        copy = KVCache(
            depth=len(self.keys),
            batch=len(rows),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_length=room,
            dtype=self.keys[0].dtype,
            device=self.keys[0].device,
        )
        copy.lengths = lengths
        copy.next_positions = [self.next_positions[row] for row in rows]
        index = torch.tensor(list(rows), device=self.keys[0].device)
        used = max(max(lengths), 1)
        for mine, theirs in zip(self.keys + self.values, copy.keys + copy.values, strict=True):
            theirs[:, :, :used] = mine[index, :, :used]
        return copy
