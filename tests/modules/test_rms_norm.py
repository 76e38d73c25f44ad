"""The RMSNorm module against torch's."""

from __future__ import annotations

import torch

from fastmllm.modules.rms_norm import RMSNorm


def test_equals_torch_alone_and_behind_a_scaled_add() -> None:
    torch.manual_seed(0)
    module = RMSNorm(12, 1e-3)
    torch.nn.init.normal_(module.weight)
    x, residual, scale = torch.randn(2, 5, 12), torch.randn(2, 5, 12), torch.randn(12)
    torch.testing.assert_close(module(x), torch.nn.functional.rms_norm(x, (12,), module.weight, 1e-3))
    for by in (None, scale):
        y, total = module.add(x, residual, by)
        expected = residual + (x if by is None else x * by)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(expected, (12,), module.weight, 1e-3))
