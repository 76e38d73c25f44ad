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
    mask: Tensor | None  # (B, 1, n, limit) bool, True = attend, or what is added to scores; None: the cache was empty
    window_mask: Tensor | None  # the same for layers with a sliding window; `mask` itself where the window is not full
    group: int = 0  # of layers that hold the same tokens


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
        groups: first layer of each group of layers that hold the same tokens: one, unless visual tokens are dropped
            between two layers.
        biases: (B, Lmax) fp32 added to the scores of each cached key, of groups that have some.
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
        self._lengths = [[0] * batch]
        self.groups = [0]
        self.biases: dict[int, Tensor] = {}
        self.next_positions = [0] * batch

    @property
    def max_length(self) -> int:
        """Tokens that a row can hold."""
        return self.keys[0].shape[2]

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row, in the first layers: what was seen."""
        return self._lengths[0]

    def split(self, layer: int, fewer: int) -> None:
        """Let the layers from this one on hold fewer tokens than those in front.

        Args:
            layer: the first of them.
            fewer: tokens a row that they will not see, of those that the first layers have room for.

        Raises:
            ValueError: the cache is not empty, or a later layer is split off already.
        """
        if any(self.lengths) or layer <= self.groups[-1]:
            raise ValueError(f"fastmllm::KVCache: layer {layer} is split off an empty cache, layer by layer")
        self.groups.append(layer)
        self._lengths.append([0] * len(self.lengths))
        for tensors in (self.keys, self.values):
            batch, heads, room, width = tensors[0].shape
            tensors[layer:] = [t.new_zeros(batch, heads, room - fewer, width) for t in tensors[layer:]]

    def reserve(self, counts: Sequence[int], window: int | None = None, group: int = 0) -> CacheSlots:
        """Place the next tokens of every sequence; the lengths move on when `advance` is called.

        Args:
            counts: new tokens of each sequence, every one >= 1.
            window: tokens that a row of a sliding-window layer sees, itself included.
            group: of layers, a place in `groups`.

        Returns:
            The slots for `write`.

        Raises:
            ValueError: another number of sequences, a sequence without a new token, or a full row.
        """
        counts = list(counts)
        lengths = self._lengths[group]
        if len(counts) != len(lengths):
            raise ValueError(f"fastmllm::KVCache: {len(counts)} sequences for a cache of {len(lengths)}")
        if min(counts) < 1:
            raise ValueError(f"fastmllm::KVCache: sequence {counts.index(min(counts))} brings no new token")
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        room = self.keys[self.groups[group]].shape[2]
        if max(ends) > room:
            raise ValueError(
                f"fastmllm::KVCache: {max(ends)} tokens do not fit into max_length {room}; "
                "make the cache longer (prompt + max_new_tokens) or shorten the prompt"
            )
        device = self.keys[0].device
        width = max(counts)
        offsets = torch.cat([torch.arange(count) for count in counts])  # (T,)
        rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))  # (T,)
        starts = torch.tensor(lengths)
        mask = window_mask = None
        if any(lengths):
            seen = (starts[:, None] + torch.arange(width))[:, None, :, None]  # last column that query j may see
            columns = torch.arange(max(ends))
            mask = columns <= seen  # (B, 1, n, limit)
            if window is not None and max(ends) > window:
                window_mask = self._biased((mask & (columns > seen - window)).to(device, non_blocking=True), group)
            mask = self._biased(mask.to(device, non_blocking=True), group)
        return CacheSlots(
            counts=counts,
            rows=rows.to(device, non_blocking=True),
            offsets=offsets.to(device, non_blocking=True),
            columns=(starts[rows] + offsets).to(device, non_blocking=True),
            limit=max(ends),
            mask=mask,
            window_mask=mask if window_mask is None else window_mask,
            group=group,
        )

    def _biased(self, mask: Tensor, group: int) -> Tensor:
        bias = self.biases.get(group)
        if bias is None:
            return mask
        bias = bias[:, None, None, : mask.shape[-1]].to(self.keys[0].dtype)
        return torch.where(mask, bias, float("-inf"))

    def add_bias(self, bias: Tensor, slots: CacheSlots) -> None:
        """Keep what is added to the scores of the new keys (T,) fp32, for later queries."""
        held = self.biases.setdefault(slots.group, bias.new_zeros(self.keys[0].shape[::2]))
        held[slots.rows, slots.columns] = bias

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
        """Count the tokens of `slots` as seen; call it once a group of layers, after the last layer.

        Args:
            slots: from `reserve`.
            next_positions: of each row; None: every new token took one position. The first group's count.
        """
        before = self._lengths[slots.group]
        self._lengths[slots.group] = [length + count for length, count in zip(before, slots.counts, strict=True)]
        if slots.group:
            return
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
        for layer in self.groups[1:]:
            copy.split(layer, min(self.max_length - self.keys[layer].shape[2], room - 1))
        copy._lengths = [[group[row] for row in rows] for group in self._lengths]
        copy.next_positions = [self.next_positions[row] for row in rows]
        index = torch.tensor(list(rows), device=self.keys[0].device)
        for mine, theirs in zip(self.keys + self.values, copy.keys + copy.values, strict=True):
            used = min(mine.shape[2], theirs.shape[2])
            theirs[:, :, :used] = mine[index, :, :used]
        for group, bias in self.biases.items():
            copy.biases[group] = bias.new_zeros(len(rows), room)
            used = min(bias.shape[1], room)
            copy.biases[group][:, :used] = bias[index, :used]
        return copy
