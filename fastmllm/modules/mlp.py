"""Feed-forward layers without biases: the gated one of Llama, one with ReLU, and any by its name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.modules.gelu_mlp import GeluMLP


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


MLPS = ("gelu", "relu", "swiglu")


def make_mlp(kind: str, width: int, hidden: int) -> nn.Module:
    """Make the feed-forward that a configuration names, without biases.

    Args:
        kind: "gelu" (OpenFlamingo), "relu" (the perceiver of Idefics) or "swiglu".
        width: of the input and the output.
        hidden: between the layers.

    Returns:
        The feed-forward.

    Raises:
        ValueError: another kind.
    """
    if kind not in MLPS:
        raise ValueError(f"make_mlp: {kind!r} must be one of {MLPS}")
    if kind == "gelu":
        return GeluMLP(width, hidden, bias=False)
    return ReluMLP(width, hidden) if kind == "relu" else GatedMLP(width, hidden)
