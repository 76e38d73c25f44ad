"""Norms are replaced by what they compute, not by what they are called."""

from __future__ import annotations

import pytest
import torch
from tiny_hf import SIGLIP
from torch import nn
from transformers import SiglipVisionConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.internvl.modeling_internvl import InternVLVisionRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from fastmllm.hf import patch, unpatch
from fastmllm.hf.fused import norms
from fastmllm.hf.fused.norms import FusedLayerNorm


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


class ChannelsFirstRMSNorm(PlainRMSNorm):
    def forward(self, x):
        shape = (-1, *[1] * (x.dim() - 2))
        return self.weight.view(shape) * x * x.square().mean(1, keepdim=True).add(self.eps).rsqrt()


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
        (ChannelsFirstRMSNorm(), "cannot be looked into"),
        (ChannelsFirstRMSNorm(3), "not those of rms_norm"),
        (GatedRMSNorm(), "other parameters"),
    ],
)
def test_a_norm_of_other_numbers_is_left(norm, reason):
    (row,) = patch(norm, ops=["rms_norm"]).left
    assert reason in row.reason


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


def test_under_autocast_torch_chooses_the_dtype():
    norm, x = nn.LayerNorm(16).bfloat16(), torch.randn(2, 16)
    report = patch(norm, ops=["layer_norm"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm(x.bfloat16())
    assert "autocast" in next(iter(report.fallbacks()[""]))
    exact = nn.LayerNorm(16)
    report = patch(exact, ops=["layer_norm"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert exact(x).dtype == torch.float32
    assert not report.fallbacks()


def test_hooks_are_not_called_by_asking():
    norm, seen = PlainRMSNorm(), []
    norm.register_forward_hook(lambda *a: seen.append(a))
    patch(norm)
    assert not seen


@pytest.mark.parametrize("case", [LlamaRMSNorm(16), Qwen2RMSNorm(16), MistralRMSNorm(16), InternVLVisionRMSNorm(16),
                                  GemmaRMSNorm(16), Gemma3RMSNorm(16)], ids=lambda n: type(n).__name__)  # fmt: skip
def test_families_norms_are_replaced(case):
    nn.init.normal_(case.weight)
    case.requires_grad_(True)
    x = torch.randn(4, 16)
    expected = case(x)
    assert patch(case).replaced, "the C++ one is at least as fast on a CPU"
    torch.testing.assert_close(case(x), expected)
    unpatch(case)


def test_the_norm_behind_a_pooling_head_is_replaced_and_the_head_is_not():
    head = SiglipMultiheadAttentionPoolingHead(SiglipVisionConfig(**SIGLIP)).eval()
    x = torch.randn(2, 5, 32)
    expected = head(x)
    report = patch(head, ops=["layer_norm"])
    assert [row.module for row in report.rows] == ["layernorm"]
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("rows", [1, 600])
@pytest.mark.parametrize("learns", [True, False])
def test_a_few_numbers_with_a_gradient_are_transformers(rows, learns, monkeypatch):
    """Autograd's call of an operator costs more there than what the operator saves."""
    called = []
    monkeypatch.setattr(norms, "rms_norm", lambda x, *args, **options: called.append(1) or x)
    monkeypatch.setattr(norms, "_agrees", lambda *args: True)
    norm = LlamaRMSNorm(48)
    report = patch(norm, ops=["rms_norm"])
    with torch.set_grad_enabled(learns):
        norm(torch.ones(rows, 48))
    assert bool(called) == (rows * 48 >= norms.FEW[torch.float32] or not learns)
    assert not report.fallbacks()
