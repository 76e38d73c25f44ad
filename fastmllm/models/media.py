"""What inserted layers of a language model look at: media for cross-attention, and DeepStack's early additions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@dataclass(kw_only=True, slots=True)
class Media:
    """Media tokens of a packed batch, and which of them each text row sees.

    Without autograd the keys and values of a layer are projected once and kept, so that decoding steps, which share
    them through `at`, project nothing. Under autograd they are projected anew, inside of what checkpointing recomputes.

    Args:
        tokens: (N, Dm) packed; None where `kv` holds everything.
        start: (T,) int32, the first media token that a text row sees (`media_ranges`, `mask_ranges`, `segment_ranges`).
        stop: (T,) int32, the token behind the last one; start >= stop: the row sees none.
        max_tokens: tokens of the longest range, host.
        gate: (T,) bool or None: an inserted layer leaves a row that is False exactly as it was, its feed-forward
            included (Llama-3.2-Vision); with None such a row only gets zeros from the attention (Flamingo).
        kv: keys and values (N, Hkv, Dh) of each layer: number i stands before decoder layer i, ~i inside of it.
    """

    tokens: Tensor | None
    start: Tensor
    stop: Tensor
    max_tokens: int
    gate: Tensor | None = None
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.start.shape
        if self.start.dim() != 1 or self.stop.shape != rows or (self.gate is not None and self.gate.shape != rows):
            gate = None if self.gate is None else tuple(self.gate.shape)
            raise ValueError(
                f"fastmllm::Media: start {tuple(rows)}, stop {tuple(self.stop.shape)} and gate {gate} must all name "
                "the (T,) packed text rows"
            )
        if self.gate is not None and self.gate.dtype != torch.bool:
            raise ValueError(f"fastmllm::Media: gate must be bool, got {self.gate.dtype}")
        if self.tokens is not None and self.tokens.dim() != 2:
            raise ValueError(f"fastmllm::Media: tokens must be packed (N, Dm), got {tuple(self.tokens.shape)}")

    def at(self, rows: Tensor) -> Media:
        """Let new text rows see what old ones saw; keys and values are shared.

        Args:
            rows: (T',) int64 rows of this object: `cu_seqlens[1:] - 1` for the first decoding step of every sequence,
                then all rows, or those of the sequences that go on.

        Returns:
            The media of the T' new rows.
        """
        gate = None if self.gate is None else self.gate[rows]
        return replace(self, start=self.start[rows], stop=self.stop[rows], gate=gate)

    def show(self, layer: nn.Module, key: int, x: Tensor) -> Tensor:
        """Run an inserted layer on the text rows.

        Args:
            layer: `keys_values(tokens (N, Dm)) -> (k, v)` and `forward(x, k, v, start, stop, max_tokens) -> (T, D)`.
            key: its number in `kv`.
            x: (T, D).

        Returns:
            (T, D).

        Raises:
            ValueError: neither tokens nor keys and values of this layer.
        """
        y = layer(x, *self._keys_values(layer, key), self.start, self.stop, self.max_tokens)
        return y if self.gate is None else torch.where(self.gate[:, None], y, x)

    def _keys_values(self, layer: nn.Module, key: int) -> tuple[Tensor, Tensor]:
        learning = torch.is_grad_enabled()
        if key in self.kv and (self.tokens is None or not learning):
            return self.kv[key]
        if self.tokens is None:
            raise ValueError(f"fastmllm::Media: neither tokens nor keys and values of layer {key}: give the tokens")
        pair: tuple[Tensor, Tensor] = layer.keys_values(self.tokens)  # type: ignore[operator]
        if not learning:
            self.kv[key] = pair
        return pair


@dataclass(kw_only=True, slots=True)
class Deepstack:
    """Features of early encoder layers, added to the visual rows behind the first decoder layers (arXiv 2406.04334).

    Args:
        tokens: (N, D) for decoder layers 0, 1, ...; as in Qwen3-VL.
        index: (N,) int64 rows of the packed text, no row twice.
    """

    tokens: tuple[Tensor, ...]
    index: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in self.tokens]
        if self.index.dim() != 1 or any(len(shape) != 2 or shape[0] != len(self.index) for shape in shapes):
            raise ValueError(
                f"fastmllm::Deepstack: index {tuple(self.index.shape)} must name the rows of tokens {shapes}"
            )

    def add(self, x: Tensor, layer: int) -> Tensor:
        """Add the features of one layer to x (T, D); behind the last of them `x` as it is."""
        if layer >= len(self.tokens):
            return x
        return x.index_add(0, self.index, self.tokens[layer].to(x.dtype))

    def at(self, index: Tensor, rows: Tensor | None = None) -> Deepstack:
        """Return the features whose tokens are left.

        Args:
            index: (N',) int64 the rows they stand at now.
            rows: (N',) int64 which of the features.
        """
        tokens = self.tokens if rows is None else tuple(t.index_select(0, rows) for t in self.tokens)
        return replace(self, tokens=tokens, index=index)
