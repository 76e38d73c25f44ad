"""What an operator is handed under autocast."""

from __future__ import annotations

import pytest
import torch

from fastmllm.hf.fusion import outside_autocast


@pytest.mark.parametrize("enabled", [False, True])
def test_an_operator_is_handed_a_linear_layers_dtype_and_no_autocast(enabled):
    tensors = [torch.zeros(2), None, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)]
    seen = []

    def compute(*given, option):
        seen.extend(t if t is None else t.dtype for t in given)
        assert option == 3
        assert not torch.is_autocast_enabled("cpu")
        return torch.zeros(())

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        outside_autocast(compute, *tensors, option=3)
        assert torch.is_autocast_enabled("cpu") == enabled
    assert seen == [torch.bfloat16 if enabled else torch.float32, None, torch.float64, torch.int64]
