"""LayerNorm over the fused op, with the residual add of pre-LN blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmllm.kernels.layer_norm import layer_norm


class LayerNorm(nn.Module):
    """Normalise the last dimension; parameter names are those of torch.nn.LayerNorm.

    Args:
        width: size of the last dimension.
        eps: added to the variance.
        bias: whether there is a shift.
    """

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., D)."""
        y = layer_norm(x, self.weight, self.bias, None, self.eps)
        assert isinstance(y, Tensor)
        return y

    def add(self, x: Tensor, residual: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (norm(h), h) with h = residual + scale * x, both (..., D), in one pass."""
        y, total = layer_norm(x, self.weight, self.bias, residual, self.eps, scale=scale)
        return y, total
