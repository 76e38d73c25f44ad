"""Liger's kernels in the gated MLPs of language models, and without liger-kernel by a stand-in of the same manners."""

from __future__ import annotations

import copy
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import MethodType, ModuleType

import pytest
import torch
from tiny_hf import LLAMA
from torch import nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from fastmllm.hf import PatchError, patch, unpatch
from fastmllm.hf.fused import liger


def stand_in(activation):
    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return activation(gate) * up

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                saved = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                grads = torch.autograd.grad(activation(saved[0]) * saved[1], saved, grad)
            for kept, value in zip(ctx.saved_tensors, grads, strict=True):
                kept.data.copy_(value)  # as Liger does, past autograd's eyes
            return ctx.saved_tensors

    return Multiply


class Scalar(float):  # Triton's interpreter hands floats on as they are
    def to(self, dtype):
        return self


@pytest.fixture(params=["stand-in", "liger"])
def kernels(request, monkeypatch):
    monkeypatch.setattr(liger, "DEVICE", "cpu")
    liger._function.cache_clear()
    if request.param == "liger":
        if importlib.util.find_spec("liger_kernel") is None:
            pytest.skip("liger-kernel is not installed")
        from liger_kernel.ops import geglu, swiglu

        import fastmllm.kernels._triton as our

        monkeypatch.setattr(swiglu, "float", Scalar, raising=False)
        monkeypatch.setattr(geglu, "tanh", lambda x: 2 * our.tl.sigmoid(2 * x) - 1)  # libdevice's has no interpreter
    else:
        package, ops = ModuleType("liger_kernel"), ModuleType("liger_kernel.ops")
        package.__spec__ = ModuleSpec("liger_kernel", None)
        ops.LigerSiLUMulFunction = stand_in(nn.functional.silu)
        ops.LigerGELUMulFunction = stand_in(lambda x: nn.functional.gelu(x, approximate="tanh"))
        monkeypatch.setitem(sys.modules, "liger_kernel", package)
        monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    yield
    liger._function.cache_clear()


def llama(act="silu"):
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(**LLAMA, hidden_act=act, mlp_bias=True))


def gemma():
    torch.manual_seed(0)
    return GemmaMLP(GemmaConfig(**LLAMA, hidden_act="gelu_pytorch_tanh"))


def results(mlp, x):
    x = x.clone().requires_grad_()
    y = mlp(x)
    return [y, *torch.autograd.grad(y, [x, *mlp.parameters()], y.detach().sin())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter miscasts bf16
@pytest.mark.parametrize("build", [llama, gemma])
def test_equals_transformers(kernels, build, dtype):
    mlp, x = build().to(dtype), torch.randn(2, 3, 48).to(dtype)
    expected, truth = results(mlp, x), results(copy.deepcopy(mlp).double(), x.double())
    report = patch(mlp, ops=["gated_mlp"], strict=True)
    assert [row.backend for row in report.replaced] == ["liger"]
    for ours, theirs, right in zip(results(mlp, x), expected, truth, strict=True):
        bound = 2 * (theirs - right).abs().max() + 8 * torch.finfo(dtype).eps * right.abs().max()
        assert (ours - right).abs().max() <= bound
    assert not report.fallbacks()


def test_a_second_backward_has_the_same_gradients(kernels):
    mlp, x = llama(), torch.randn(3, 48)
    patch(mlp, ops=["gated_mlp"])
    loss = mlp(x).square().sum()
    first = torch.autograd.grad(loss, list(mlp.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(mlp.parameters()), retain_graph=True)
    last = torch.autograd.grad(loss, list(mlp.parameters()))
    for a, b, c in zip(first, again, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_gradient_of_gradients_is_refused(kernels):
    mlp, x = llama(), torch.randn(3, 48)
    patch(mlp, ops=["gated_mlp"])
    (grad,) = torch.autograd.grad(mlp(x).sum(), [mlp.gate_proj.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_hooks_are_not_shown_what_is_overwritten(kernels):
    mlp, x = llama(), torch.randn(3, 48)
    expected = mlp(x)
    report = patch(mlp, ops=["gated_mlp"])
    handle = mlp.up_proj.register_forward_hook(lambda *_: None)
    assert torch.equal(mlp(x), expected)
    handle.remove()
    mlp.act_fn = nn.ReLU()
    assert torch.equal(mlp(x), mlp.down_proj(mlp.gate_proj(x).relu() * mlp.up_proj(x)))
    assert len(report.fallbacks()[""]) == 2


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_another_activation_is_left(kernels, act):
    assert "its activation is" in liger.GatedMLP.refuses(llama(act))


def test_a_gelu_by_another_formula_is_left(kernels, monkeypatch):
    mlp = gemma()
    monkeypatch.setattr(type(mlp.act_fn), "forward", lambda self, x: nn.functional.gelu(x))
    assert "is not the gelu" in liger.GatedMLP.refuses(mlp)


def test_what_liger_has_bound_is_left(kernels):
    mlp = llama()
    mlp.__dict__["forward"] = MethodType(lambda self, x: x, mlp)  # as liger's apply_* with an instance do
    (row,) = patch(mlp, ops=["gated_mlp"]).rows
    assert row.backend is None
    assert "already replaced" in row.reason


def test_on_a_cpu_it_is_left_and_fails_only_who_asks_for_it():
    mlp, x = llama(), torch.randn(3, 48)
    expected = mlp(x)
    (row,) = patch(mlp).rows
    assert row.backend is None
    assert torch.equal(mlp(x), expected)
    with pytest.raises(PatchError, match="gated_mlp"):
        patch(mlp, ops=["gated_mlp"], strict=True)
    unpatch(mlp)
