"""Visual-token compression: N tokens an image become K. One method a file, one interface."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastmllm.compression.bipartite_merge import bipartite_merge
from fastmllm.compression.pool import pool

METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {"pool": pool, "bipartite_merge": bipartite_merge}

__all__ = ["METHODS", "bipartite_merge", "compress", "pool"]


def compress(tokens: Tensor, method: str, *, keep: int) -> Tensor:
    """Reduce every image's visual tokens to exactly `keep`.

    Args:
        tokens: (I, N, D), a row-major grid.
        method: a key of `METHODS`.
        keep: K, 1 <= K <= N; K = N returns the tokens unchanged.

    Returns:
        (I, K, D).

    Raises:
        ValueError: unknown method, K outside 1..N, or a K that the method cannot make of this grid.
    """
    if tokens.dim() != 3:
        raise ValueError(f"compress: tokens must be (I, N, D), got {tuple(tokens.shape)}")
    if method not in METHODS:
        raise ValueError(f"compress: unknown method {method!r}; known: {', '.join(METHODS)}")
    num_tokens = tokens.shape[1]
    if not 1 <= keep <= num_tokens:
        raise ValueError(f"compress: keep {keep} must lie in 1..{num_tokens}, the tokens of an image")
    return tokens if keep == num_tokens else METHODS[method](tokens, keep)
