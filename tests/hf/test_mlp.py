"""Linear, GELU, linear: found by structure and by numbers, left wherever a part has to be called."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from fastmllm.hf import patch, unpatch
from fastmllm.hf.fused.mlp import GeluMLP
from fastmllm.hf.fusion import fuse


class MLP(nn.Module):
    def __init__(self, act="gelu", names=("fc1", "activation_fn", "fc2"), norm=None, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.names, self.norm = names, norm
        if norm:
            setattr(self, norm, nn.LayerNorm(24))
        setattr(self, names[0], nn.Linear(24, 40, bias=bias))
        setattr(self, names[1], ACT2FN[act] if isinstance(act, str) else act)
        setattr(self, names[2], nn.Linear(40, 16, bias=bias))

    def forward(self, x):
        x = getattr(self, self.norm)(x) if self.norm else x
        for name in self.names:
            x = getattr(self, name)(x)
        return x


CASES = {
    "clip": MLP("quick_gelu"),
    "siglip": MLP("gelu_pytorch_tanh"),
    "python tanh": MLP("gelu_new"),
    "fast": MLP("gelu_fast"),
    "dinov2 of 5.17": MLP("gelu", ("fc1", "activation", "fc2")),
    "llava": MLP("gelu", ("linear_1", "act", "linear_2"), bias=False),
    "internvl": MLP("gelu", ("linear_1", "act", "linear_2"), norm="layer_norm"),
    "vipllava": MLP(nn.GELU(approximate="tanh"), ("linear_1", "act", "linear_2"), norm="projector_layernorm"),
    "qwen3_vl": MLP(nn.GELU(), ("linear_fc1", "act_fn", "linear_fc2")),
}


def results(mlp, x):
    x = x.clone().requires_grad_()
    y = mlp(x)
    return [y, *torch.autograd.grad(y, [x, *(p for p in mlp.parameters() if p.requires_grad)], y.detach().sin())]


def fused(mlp):
    mlp = copy.deepcopy(mlp)
    fuse(mlp, (GeluMLP,))
    return mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_modules(case, dtype):
    mlp, x = copy.deepcopy(CASES[case]).to(dtype), torch.randn(2, 5, 24).to(dtype)
    assert GeluMLP.refuses(mlp) is None
    mine = fused(mlp)
    right = results(copy.deepcopy(mlp).double(), x.double())
    for ours, theirs, truth in zip(results(mine, x), results(mlp, x), right, strict=True):
        scale = 8 * torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + scale
    assert "_fastmllm_fallbacks" not in mine.__dict__


class Doubled(MLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Dropped(MLP):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout()


class Homemade(nn.Module):
    def forward(self, x):
        return nn.functional.gelu(x)


@pytest.mark.parametrize(
    "mlp, reason",
    [
        (MLP("silu"), "activation is SiLU"),
        (MLP("gelu_10"), "activation is ClippedGELU"),
        (MLP(Homemade()), "activation is Homemade"),
        (Doubled(), "its numbers"),
        (Dropped(), "other parts"),
        (MLP(names=("fc1", "act", "out")), "other parts"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_another_structure_is_left(mlp, reason):
    assert reason in GeluMLP.refuses(mlp)


@pytest.mark.parametrize(
    "name, limit",
    [("gelu_pytorch_tanh", None), ("quick_gelu", None), ("gelu", 10)],  # erf's, erf's, a clipped one
)
def test_an_activation_of_other_numbers_is_left(monkeypatch, name, limit):
    mlp = MLP(name)
    formula = nn.functional.gelu if limit is None else lambda x: nn.functional.gelu(x).clamp(max=limit)
    monkeypatch.setattr(type(mlp.activation_fn), "forward", lambda self, x: formula(x))
    assert "is not the" in GeluMLP.refuses(mlp)


class LoRA(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def _replace(mlp):
    mlp.fc2 = LoRA(40, 16)


def _hook(mlp):
    mlp.fc1.register_forward_hook(lambda module, args, y: y + 1)


def _watch(mlp):
    mlp.activation_fn.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _shard(mlp):
    mlp.fc1.weight.ds_id = 0


def _other(mlp):
    mlp.activation_fn = nn.ReLU()


def _add(mlp):
    mlp.extra = nn.Dropout()


@pytest.mark.parametrize("change", [_replace, _hook, _watch, _shard, _other, _add])
def test_what_has_to_be_called_is_called(change):
    mlp, x = MLP(), torch.randn(3, 24)
    mine = fused(mlp)
    torch.manual_seed(1)
    change(mlp)
    torch.manual_seed(1)
    change(mine)
    assert torch.equal(mine(x), mlp(x))
    assert sum(mine.__dict__["_fastmllm_fallbacks"].values()) == 1


def test_another_dtype_is_torchs_to_refuse():
    with pytest.raises(RuntimeError, match="dtype"):
        fused(MLP())(torch.zeros(2, 24, dtype=torch.bfloat16))


@pytest.mark.parametrize("case", ["clip", "internvl"])
def test_autocast_has_torchs_dtype_and_numbers(case):
    mlp, x = CASES[case], torch.randn(4, 24)
    mine = fused(mlp)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = results(mlp, x), results(mine, x)
    assert "_fastmllm_fallbacks" not in mine.__dict__
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=0.02 * theirs.detach().abs().max().item(), rtol=0)


def test_frozen_weights_get_no_gradient():
    mlp = fused(MLP()).requires_grad_(False)
    x = torch.randn(3, 24, requires_grad=True)
    mlp(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in mlp.parameters())


@pytest.mark.parametrize("case", ["clip", "vipllava"])
def test_compiles_into_one_graph(case):
    torch._dynamo.reset()  # other tests' graphs of the same method count against the limit
    mine, x = fused(CASES[case]), torch.randn(3, 24)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mine(x))


def test_on_a_cpu_torch_is_faster():
    class CLIPMLP(MLP):
        pass

    CLIPMLP.__module__ = "transformers.models.clip.modeling_clip"
    mlp = CLIPMLP("quick_gelu")
    (row,) = patch(mlp).rows
    assert row.backend is None
    assert not row.refused
    assert patch(mlp, ops=["gelu_mlp"], strict=True).replaced
    assert type(unpatch(mlp)) is CLIPMLP
