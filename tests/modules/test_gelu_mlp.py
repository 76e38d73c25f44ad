"""The MLP module against two linear layers and torch's activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmllm.modules.gelu_mlp import GeluMLP

ORACLES = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("activation", ORACLES)
def test_equals_two_linear_layers(activation: str) -> None:
    torch.manual_seed(0)
    mlp = GeluMLP(6, 10, activation)
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == {
        "weight1": (10, 6), "bias1": (10,), "weight2": (6, 10), "bias2": (6,)
    }  # fmt: skip
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 6, requires_grad=True)
    expected = F.linear(ORACLES[activation](F.linear(x, mlp.weight1, mlp.bias1)), mlp.weight2, mlp.bias2)
    y = mlp(x)
    torch.testing.assert_close(y, expected)
    inputs = [x, *mlp.parameters()]
    grads = (torch.autograd.grad(out.square().sum(), inputs) for out in (y, expected))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_another_width_out_without_biases() -> None:
    torch.manual_seed(0)
    mlp, x = GeluMLP(6, 10, width_out=3, bias=False), torch.randn(4, 6)
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == {"weight1": (10, 6), "weight2": (3, 10)}
    torch.testing.assert_close(mlp(x), F.linear(F.gelu(F.linear(x, mlp.weight1)), mlp.weight2))


def test_bad_sizes_and_names_are_refused() -> None:
    for args in ((0, 4), (4, 0), (4, 4, "relu")):
        with pytest.raises(ValueError, match="GeluMLP"):
            GeluMLP(*args)
