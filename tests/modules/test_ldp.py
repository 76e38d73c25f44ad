"""MobileVLM V2's projector against its formula in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from connector_checks import assert_equals_formula, assert_packs
from torch import Tensor

from fastmllm.models.weights.connectors import LDPV2_RULES
from fastmllm.modules.depthwise_conv import DepthwiseConv
from fastmllm.modules.ldp import LDPv2

GRIDS = [(4, 4), (2, 6), (2, 6), (4, 2)]


def formula(t: dict[str, Tensor], x: Tensor, grid: tuple[int, int]) -> Tensor:
    """MLP; average of 2 x 2 (published as an adaptive average to half the grid); z + depthwise 3 x 3 of z."""
    name = "mm_projector.mlp.mlp"
    x = F.gelu(x @ t[f"{name}.0.weight"].t() + t[f"{name}.0.bias"]) @ t[f"{name}.2.weight"].t() + t[f"{name}.2.bias"]
    z = F.adaptive_avg_pool2d(x.t().unflatten(1, grid)[None], (grid[0] // 2, grid[1] // 2))
    z = z + F.conv2d(
        z, t["mm_projector.peg.peg.0.weight"], t["mm_projector.peg.peg.0.bias"], padding=1, groups=z.shape[1]
    )
    return z[0].flatten(1).t()


def test_equals_the_formula() -> None:
    assert_equals_formula(LDPv2(6, 10), LDPV2_RULES, formula, [6], GRIDS)


def test_packs() -> None:
    assert_packs(LDPv2(6, 10), [6], GRIDS)


def test_rejects_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples of pool 2"):
        LDPv2(4, 4)(torch.randn(6, 4), [(3, 2)])
    with pytest.raises(ValueError, match="8 tokens"):
        LDPv2(4, 4)(torch.randn(8, 4), [(2, 2)])
    with pytest.raises(ValueError, match="pool=0"):
        LDPv2(4, 4, pool=0)
    with pytest.raises(ValueError, match="kernel_size=2"):
        DepthwiseConv(4, 2)
