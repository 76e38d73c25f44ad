"""RMSNorm as a module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmllm.modules.layer_norm import LayerNorm
from fastmllm.modules.rms_norm import RMSNorm, make_norm


def test_equals_torch() -> None:
    norm = RMSNorm(8, 1e-3)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-3))
    y, total = norm.add(x, residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, F.rms_norm(x + residual, (8,), norm.weight, 1e-3))


def test_a_norm_by_its_name() -> None:
    assert isinstance(make_norm("layer", 4, 1e-5), LayerNorm)
    assert make_norm("rms", 4, 1e-3).eps == 1e-3
    with pytest.raises(ValueError, match="'batch' must be one of"):
        make_norm("batch", 4, 1e-5)


def test_a_scaled_add_equals_torch() -> None:
    torch.manual_seed(0)
    module = RMSNorm(12, 1e-3)
    torch.nn.init.normal_(module.weight)
    x, residual, scale = torch.randn(2, 5, 12), torch.randn(2, 5, 12), torch.randn(12)
    y, total = module.add(x, residual, scale)
    torch.testing.assert_close(total, residual + x * scale)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(total, (12,), module.weight, 1e-3))
