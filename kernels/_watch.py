"""Calls of operators whose work only their arguments tell, reported to who asks: counters of operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Watcher = Callable[[str, tuple[Any, ...]], None]

# of the process, not of a thread: what checkpointing computes again on a GPU runs in autograd's thread
_watchers: list[Watcher] = []


def report(operator: str, *args: Any) -> None:
    """Tell that an operator has run; without watchers that is all it costs."""
    for watcher in _watchers:
        watcher(operator, args)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Let `watcher(operator, arguments)` hear of every call inside. It must not read tensors on a GPU, nor run others.

    The arguments: "attention" q, k, v, cu_seqlens_q, cu_seqlens_k, causal; "cross_attention" q, k, v, media_start,
    media_stop; "cached_attention" q, mask (B, 1, n, L), row and place of each query; "patch_embed" pixels, weight;
    "gelu_mlp" x, weight1, bias1, weight2; "linear_cross_entropy" hidden, weight, labels, ignore_index, num_targets, and
    whether a backward pass computes the logits again.
    """
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
