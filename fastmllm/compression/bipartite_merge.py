"""Merge the most similar tokens, round by round (Token Merging, Bolya et al., arXiv 2210.09461)."""

from __future__ import annotations

from torch import Tensor

from fastmllm.kernels.token_merge import token_merge


def bipartite_merge(tokens: Tensor, keep: int) -> Tensor:
    """Merge tokens by bipartite soft matching until `keep` are left; each is the mean of what it stands for.

    The tokens themselves are the metric; a round merges at most half of them. The order of the tokens is kept.

    Args:
        tokens: (I, N, D).
        keep: K < N.

    Returns:
        (I, K, D).
    """
    size = None
    while tokens.shape[1] > keep:
        merged = min(tokens.shape[1] - keep, tokens.shape[1] // 2)
        tokens, size, *_ = token_merge(tokens, tokens, size, merged)
    return tokens
