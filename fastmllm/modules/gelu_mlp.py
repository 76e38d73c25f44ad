"""The two-layer GELU MLP of vision towers over the fused op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmllm.kernels.gelu_mlp import gelu_mlp

# names in configurations -> the op's
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh", "quick_gelu": "quick"}


class GeluMLP(nn.Module):
    """Linear, GELU, linear; all four tensors are its own, so that ZeRO-3 gathers them with it.

    Args:
        width: in and out.
        hidden: between the layers.
        activation: "gelu", "gelu_tanh" or "quick_gelu".

    Equal to the MLP of CLIP, SigLIP, DINOv2, InternViT and BLIP-2's ViT.
    """

    def __init__(self, width: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        if min(width, hidden) < 1 or activation not in ACTIVATIONS:
            raise ValueError(
                f"GeluMLP: {width=} and {hidden=} must be >= 1, {activation=} one of {sorted(ACTIVATIONS)}"
            )
        self.approximate = ACTIVATIONS[activation]
        self.weight1, self.bias1 = nn.Parameter(torch.empty(hidden, width)), nn.Parameter(torch.zeros(hidden))
        self.weight2, self.bias2 = nn.Parameter(torch.empty(width, hidden)), nn.Parameter(torch.zeros(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights at 0.02, zero the biases."""
        for weight in (self.weight1, self.weight2):
            nn.init.trunc_normal_(weight, std=0.02)
        for bias in (self.bias1, self.bias2):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to `x` (..., width)."""
        return gelu_mlp(x, self.weight1, self.bias1, self.weight2, self.bias2, self.approximate)
