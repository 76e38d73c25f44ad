"""The LayerNorm module against torch's."""

from __future__ import annotations

import torch

from fastmllm.modules.layer_norm import LayerNorm


def test_equals_torch_and_takes_its_state() -> None:
    torch.manual_seed(0)
    reference = torch.nn.LayerNorm(12, eps=1e-3)
    torch.nn.init.normal_(reference.weight)
    torch.nn.init.normal_(reference.bias)
    module = LayerNorm(12, 1e-3)
    module.load_state_dict(reference.state_dict())
    x, residual = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    torch.testing.assert_close(module(x), reference(x))
    y, total = module.add(x, residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, reference(x + residual))
    scale = torch.randn(12)
    y, total = module.add(x, residual, scale)
    torch.testing.assert_close(total, x * scale + residual)
    torch.testing.assert_close(y, reference(x * scale + residual))


def test_without_bias() -> None:
    module = LayerNorm(8, bias=False)
    assert list(module.state_dict()) == ["weight"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(module(x), torch.nn.functional.layer_norm(x, (8,)))
