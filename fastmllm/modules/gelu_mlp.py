"""The two-layer GELU MLP of vision towers, Q-Formers and connectors over the fused op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmllm.kernels.gelu_mlp import gelu_mlp

# names in configurations -> the op's
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh", "quick_gelu": "quick"}


class GeluMLP(nn.Module):
    """Linear, GELU, linear; all tensors are its own, so that ZeRO-3 gathers them with it.

    Args:
        width: in, and out unless `width_out` says otherwise.
        hidden: between the layers.
        activation: "gelu", "gelu_tanh" or "quick_gelu".
        width_out: out; None for `width`.
        bias: whether both layers have one.

    Equal to the MLP of CLIP, SigLIP, DINOv2, InternViT, BLIP-2's ViT and Q-Former, and to LLaVA-1.5's `mlp2x_gelu`.
    """

    def __init__(
        self, width: int, hidden: int, activation: str = "gelu", *, width_out: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        width_out = width if width_out is None else width_out
        if min(width, hidden, width_out) < 1 or activation not in ACTIVATIONS:
            raise ValueError(
                f"GeluMLP: {width=}, {hidden=} and {width_out=} must be >= 1, {activation=} one of "
                f"{sorted(ACTIVATIONS)}"
            )
        self.approximate = ACTIVATIONS[activation]
        self.weight1 = nn.Parameter(torch.empty(hidden, width))
        self.weight2 = nn.Parameter(torch.empty(width_out, hidden))
        self.bias1 = nn.Parameter(torch.zeros(hidden)) if bias else None
        self.bias2 = nn.Parameter(torch.zeros(width_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights at 0.02, zero the biases."""
        for weight in (self.weight1, self.weight2):
            nn.init.trunc_normal_(weight, std=0.02)
        for bias in (self.bias1, self.bias2):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to `x` (..., width)."""
        return gelu_mlp(x, self.weight1, self.bias1, self.weight2, self.bias2, self.approximate)
