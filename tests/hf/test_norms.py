"""Norms are replaced by what they compute, not by what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmllm.hf import patch
from fastmllm.hf.fused.norms import FusedLayerNorm, FusedRMSNorm


class PlainRMSNorm(nn.Module):
    def __init__(self, width=16, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.linspace(0.5, 1.5, width)), eps

    def forward(self, x):
        return self.weight * (x.float() * x.float().square().mean(-1, keepdim=True).add(self.eps).rsqrt()).to(x.dtype)


class ShiftedRMSNorm(PlainRMSNorm):  # its weight lies around zero, but its name does not begin with Gemma
    def forward(self, x):
        return super().forward(x) + x * x.square().mean(-1, keepdim=True).add(self.eps).rsqrt()


class DoubledEpsRMSNorm(PlainRMSNorm):
    def forward(self, x):
        return self.weight * x * x.square().mean(-1, keepdim=True).add(2 * self.eps).rsqrt()


class GatedRMSNorm(PlainRMSNorm):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_of_the_same_numbers_is_replaced(dtype):
    norm, x = PlainRMSNorm().to(dtype), torch.randn(5, 16).to(dtype)
    expected = norm(x)
    assert patch(norm, ops=["rms_norm"]).replaced
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(
    "norm, reason",
    [
        (ShiftedRMSNorm(), "not those of rms_norm"),
        (DoubledEpsRMSNorm(eps=1e-4), "not those of rms_norm"),
        (GatedRMSNorm(), "other parameters"),
    ],
)
def test_a_norm_of_other_numbers_is_left(norm, reason):
    assert reason in FusedRMSNorm.refuses(norm)


def test_asking_draws_no_random_number():
    state = torch.get_rng_state()
    patch(PlainRMSNorm())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", [nn.LayerNorm((4, 16)), nn.LayerNorm(16, elementwise_affine=False)])
def test_a_layer_norm_of_another_shape_is_left(norm):
    assert "it normalises" in FusedLayerNorm.refuses(norm)


def test_another_dtype_runs_torch_and_is_counted():
    norm = nn.LayerNorm(16)
    report = patch(norm, ops=["layer_norm"])
    assert norm(torch.zeros(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert report.fallbacks() == {"": {"layer_norm: x is torch.bfloat16, its weight torch.float32": 1}}
