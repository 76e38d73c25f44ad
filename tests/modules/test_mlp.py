"""Bias-free feed-forward layers against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmllm.modules.mlp import MLPS, GatedMLP, make_mlp

FORMULAS = {
    "gelu": lambda m, x: F.gelu(x @ m.weight1.T) @ m.weight2.T,
    "relu": lambda m, x: F.relu(x @ m.fc1.weight.T) @ m.fc2.weight.T,
    "swiglu": lambda m, x: (F.silu(x @ m.gate_proj.weight.T) * (x @ m.up_proj.weight.T)) @ m.down_proj.weight.T,
}


@pytest.mark.parametrize("kind", MLPS)
def test_equals_the_formula(kind: str) -> None:
    torch.manual_seed(0)
    mlp = make_mlp(kind, 6, 10)
    x = torch.randn(5, 6, requires_grad=True)
    y, expected = mlp(x), FORMULAS[kind](mlp, x)
    torch.testing.assert_close(y, expected)
    inputs = [x, *mlp.parameters()]
    got, want = (torch.autograd.grad(t.square().sum(), inputs) for t in (y, expected))
    torch.testing.assert_close(got, want)
    assert all(p.dim() == 2 and p.std() > 0.01 for p in mlp.parameters())  # weights only, drawn
    assert mlp(x[:0]).shape == (0, 6)


def test_a_gated_mlp_can_change_the_width() -> None:
    assert GatedMLP(6, 10, 3)(torch.randn(2, 6)).shape == (2, 3)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'tanh' must be one of"):
        make_mlp("tanh", 6, 10)
