"""Average pooling of the token grid, the yardstick of every learned compressor (LLaVA-OneVision, M3)."""

from __future__ import annotations

import math

from torch import Tensor

from fastmllm.kernels.token_pool import token_pool


def pool(tokens: Tensor, keep: int) -> Tensor:
    """Average a square grid of tokens down to `keep`, as square a grid as its factors allow.

    Args:
        tokens: (I, N, D), N a square number, row-major.
        keep: K; K = rows x columns with neither above the grid's side.

    Returns:
        (I, K, D), row-major.

    Raises:
        ValueError: N is no square, or K has no such factors.
    """
    num_tokens = tokens.shape[1]
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"pool: {num_tokens} tokens are no square grid")
    rows = next((r for r in range(math.isqrt(keep), 0, -1) if keep % r == 0), 1)
    columns = keep // rows
    if columns > side:
        raise ValueError(
            f"pool: {keep} tokens do not form a grid within {side} x {side}; take a product of two numbers"
        )
    return token_pool(tokens, size=(rows, columns))
