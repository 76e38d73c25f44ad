"""Feed-forward layers without biases: linear, GELU or ReLU, linear; and the gated one of Llama."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.kernels.gelu_mlp import gelu_mlp


class GeluMLP(nn.Module):
    """weight2 gelu(weight1 x), over the op that keeps no activation (OpenFlamingo, arXiv 2308.01390).

    Args:
        width: of the input and the output.
        hidden: between the two layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # its own parameters, not those of linear layers: sharded training gathers what a module's forward reads
        self.weight1 = nn.Parameter(torch.empty(hidden, width))
        self.weight2 = nn.Parameter(torch.empty(width, hidden))
        for weight in (self.weight1, self.weight2):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: (T, D) -> (T, D)."""
        return gelu_mlp(x, self.weight1, None, self.weight2, None)


class ReluMLP(nn.Module):
    """fc2(relu(fc1(x))), in the perceiver of Idefics.

    Args:
        width: of the input and the output.
        hidden: between the two layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: (T, D) -> (T, D)."""
        return self.fc2(F.relu(self.fc1(x)))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), SwiGLU (arXiv 2002.05202), in Llama, Idefics and Llama-3.2-Vision.

    Args:
        width: of the input.
        hidden: of the gate and of what it multiplies.
        width_out: of the output; None means `width`.
    """

    def __init__(self, width: int, hidden: int, width_out: int | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width if width_out is None else width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: (T, D) -> (T, E)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


MLPS: dict[str, type[GeluMLP] | type[ReluMLP] | type[GatedMLP]] = {
    "gelu": GeluMLP,
    "relu": ReluMLP,
    "swiglu": GatedMLP,
}
