"""RMSNorm over the fused op, with the residual add of pre-norm blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmllm.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Scale the last dimension to unit mean square.

    Args:
        width: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., D)."""
        y = rms_norm(x, self.weight, eps=self.eps)
        assert isinstance(y, Tensor)
        return y

    def add(self, x: Tensor, residual: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (norm(h), h) with h = residual + scale * x, both (..., D), in one pass."""
        y, total = rms_norm(x, self.weight, residual, self.eps, scale=scale)
        return y, total
