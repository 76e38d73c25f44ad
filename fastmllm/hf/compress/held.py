"""What a cache holds of the text in the layers behind each stage: columns that are left of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HELD = "_fastmllm_stages"  # on a cache
GROWS = ("DynamicLayer", "DynamicSlidingWindowLayer")


@dataclass(frozen=True, slots=True)
class Left:
    """Columns of a text in one group of layers.

    Args:
        index: (B, T') int64 the column that each was, PAD for none.
        padded: there is a PAD.
        bias: (B, T') added to the scores of each as a key, or None.
    """

    index: Tensor
    padded: bool = False
    bias: Tensor | None = None

    def then(self, other: Left) -> Left:
        """Return these and the ones behind them."""
        bias = self.bias
        if bias is not None or other.bias is not None:
            biases = [x.index.new_zeros(x.index.shape, dtype=torch.float32) if x.bias is None else x.bias
                      for x in (self, other)]  # fmt: skip
            bias = torch.cat([b.to(biases[-1].dtype) for b in biases], 1)
        return Left(torch.cat([self.index, other.index], 1), self.padded or other.padded, bias)


@dataclass(slots=True)
class Held:
    """A cache's text.

    Args:
        columns: it has.
        left: of them in the layers from each stage on; None: all.
    """

    columns: int = 0
    left: list[Left | None] = field(default_factory=list)


def text(first: int, columns: int, batch: int, device: torch.device) -> Left:
    """Return all columns of a text."""
    return Left(torch.arange(first, first + columns, device=device).expand(batch, -1))


@torch.compiler.disable
def held(cache: Any, layers: Sequence[int], batch: int) -> Held:
    """Return what a cache holds in front of layers.

    Raises:
        ValueError: the cache is of another batch or of a kind that cannot be shorter in some layers, or what it has
            lost since is not text alone.
    """
    columns = 0 if cache is None else int(cache.get_seq_length())
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())} - set(GROWS)
    if kinds:
        raise ValueError(
            f"compress: a cache of {', '.join(sorted(kinds))}: layers behind a stage hold fewer tokens, which a "
            "DynamicCache can"
        )
    seen: Held | None = getattr(cache, HELD, None)
    if not columns or seen is None:
        return Held(columns, [None] * len(layers))
    left = [_now(x, seen, columns, batch) for x in seen.left]
    for layer, x in zip(layers, left, strict=True):
        if x is not None and int(cache.get_seq_length(layer)) != x.index.shape[1]:
            raise ValueError(
                f"compress: the cache was cropped to {columns} tokens, layer {layer} to "
                f"{int(cache.get_seq_length(layer))} of {x.index.shape[1]}: take as many off each, by crop(-n)"
            )
    return Held(columns, left)


def _now(x: Left | None, seen: Held, columns: int, batch: int) -> Left | None:
    """Return what is left of a group's columns, as the cache is longer or shorter by now."""
    if x is None:
        return None
    if len(x.index) != batch:
        raise ValueError(
            f"compress: the cache is of {len(x.index)} rows, the text of {batch}; choose or repeat rows "
            "of a cache by its own methods, or fill one anew"
        )
    if columns > seen.columns:
        return x.then(text(seen.columns, columns - seen.columns, batch, x.index.device))
    kept = x.index.shape[1] - (seen.columns - columns)
    gone = torch.arange(columns, seen.columns, device=x.index.device)
    if kept < 0 or not bool((x.index[:, kept:] == gone).all()):
        raise ValueError(
            f"compress: the cache was cropped to {columns} tokens, but only text behind its last image can be taken "
            "back, and none that is padded behind: fill a cache anew"
        )
    return Left(x.index[:, :kept], x.padded, None if x.bias is None else x.bias[:, :kept])
