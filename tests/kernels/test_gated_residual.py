"""gated_residual: the operator equals torch, Triton equals the operator, autograd and the dispatcher hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import gated_residual as op
from fastmllm.kernels.gated_residual import gated_residual

SHAPES = [(3, 5, 33), (7, 64), (1, 1), (0, 16)]


def _inputs(shape, dtype, scalar, device="cpu"):
    torch.manual_seed(0)
    tensors = torch.randn(shape), torch.randn(shape), torch.randn(1 if scalar else shape[-1]) * 0.7
    return [t.to(device, dtype) for t in tensors]


def _torch(x, branch, gate):
    return x + gate.tanh() * branch


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scalar", [False, True])
def test_matches_torch(shape, dtype, scalar):
    inputs = _inputs(shape, dtype, scalar)
    seed = torch.randn(shape)
    results = []
    for kind in (dtype, torch.float64):
        leaves = [t.to(kind).requires_grad_() for t in inputs]
        out = _torch(*leaves)
        results.append([out, *gradients([out], leaves, [seed])])
    leaves = [strided(t).requires_grad_() for t in inputs]
    out = gated_residual(*leaves)
    for g, s, o in zip([out, *gradients([out], leaves, [seed])], *results, strict=True):
        assert_as_accurate(g, s, o)


@pytest.mark.parametrize("shape", [(3, 33), (9, 64), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scalar", [False, True])
def test_triton_matches_reference(shape, dtype, scalar, device, guard):
    inputs = _inputs(shape, dtype, scalar, device)
    _, branch, gate = inputs
    wide = [t.double() for t in inputs]
    got = guard.run(op.gated_residual_triton, *inputs)
    assert_as_accurate(got, op.gated_residual_reference(*inputs), op.gated_residual_reference(*wide))
    grad = torch.randn(shape).to(device, dtype)
    got = guard.run(op.gated_residual_bwd_triton, grad, branch, gate, True, True)
    want = op.gated_residual_bwd_reference(grad, branch, gate, True, True)
    exact = op.gated_residual_bwd_reference(grad.double(), *wide[1:], True, True)
    for g, s, o in zip(got, want, exact, strict=True):
        assert_as_accurate(g, s, o)


def test_triton_gate_keeps_its_digits_everywhere(device):
    """tanh of tiny, middling and huge gates, and no overflow."""
    gate = torch.tensor([0.0, 1e-6, -3e-3, 0.1, 0.199, 0.201, -0.9, 5.0, -50.0, 1e4], device=device)
    zero, one = torch.zeros(1, 10, device=device), torch.ones(1, 10, device=device)
    got = op.gated_residual_triton(zero, one, gate)[0]
    torch.testing.assert_close(got, gate.double().tanh().float(), rtol=1e-6, atol=0)


def test_triton_backward_of_a_stride_0_gradient(device):
    _, branch, gate = _inputs((3, 33), torch.float32, False, device)
    grad = torch.ones((), device=device).expand(3, 33)
    got = op.gated_residual_bwd_triton(grad, branch, gate, True, True)
    want = op.gated_residual_bwd_reference(grad, branch, gate, True, True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=2e-6, rtol=1e-5)


def test_frozen_inputs_cost_no_gradient(device):
    _, branch, gate = _inputs((3, 8), torch.float32, True, device)
    for function in (op.gated_residual_bwd_reference, op.gated_residual_bwd_triton):
        dbranch, dgate = function(torch.ones_like(branch), branch, gate, False, True)
        assert (dbranch.numel(), dgate.numel()) == (0, 1)
        dbranch, dgate = function(torch.ones_like(branch), branch, gate, True, False)
        assert (dbranch.numel(), dgate.numel()) == (24, 0)
    x = torch.randn(3, 8, requires_grad=True)
    gated_residual(x, torch.randn(3, 8), torch.zeros(1)).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))


def test_a_closed_gate_is_the_identity_and_still_learns():
    x, branch, _ = _inputs((4, 8), torch.bfloat16, True)
    gate = torch.zeros((), requires_grad=True)
    y = gated_residual(x, branch, gate)
    assert torch.equal(y, x)
    y.sum().backward()
    assert gate.grad.shape == ()
    assert gate.grad != 0


@pytest.mark.parametrize("scalar", [False, True])
def test_the_gradient_of_the_gate_takes_products_beyond_fp16(scalar, device):
    """grad * branch may exceed 65504 where their sum does not."""
    grad = torch.tensor([[300.0], [-300.0], [1.0]]).expand(3, 4).to(device, torch.float16)
    branch = torch.full((3, 4), 300.0, device=device, dtype=torch.float16)
    gate = torch.zeros(1 if scalar else 4, device=device, dtype=torch.float16)
    for function in (op.gated_residual_bwd_reference, op.gated_residual_bwd_triton):
        dgate = function(grad, branch, gate, False, True)[1]
        assert torch.equal(dgate, torch.full_like(gate, 1200.0 if scalar else 300.0))


@pytest.mark.parametrize("scalar", [False, True])
def test_opcheck(scalar):
    inputs = [t.requires_grad_() for t in _inputs((3, 8), torch.float32, scalar)]
    torch.library.opcheck(torch.ops.fastmllm.gated_residual.default, tuple(inputs))


def test_compile():
    inputs = [t.requires_grad_() for t in _inputs((3, 8), torch.float32, False)]
    compiled = torch.compile(gated_residual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), gated_residual(*inputs))


@pytest.mark.parametrize("scalar", [False, True])
def test_gradcheck(scalar):
    inputs = [t.requires_grad_() for t in _inputs((2, 5), torch.float64, scalar)]
    assert torch.autograd.gradcheck(gated_residual, inputs)


def _count_launches(monkeypatch, *kernels):
    """Record launches instead of making them."""
    launched = []
    for name in kernels:
        record = {"__getitem__": lambda self, grid, name=name: lambda *args, **options: launched.append(name)}
        monkeypatch.setattr(op, name, type("Kernel", (), record)())
    return launched


def test_one_launch_forward_one_backward_and_no_wait(monkeypatch):
    """Meta tensors cannot be read: a launcher that waits for the device fails here."""
    launched = _count_launches(monkeypatch, "_fwd_kernel", "_bwd_kernel")
    for scalar in (False, True):
        inputs = _inputs((7, 64), torch.bfloat16, scalar, "meta")
        y = op.gated_residual_triton(*inputs)
        assert launched == ["_fwd_kernel"]
        op.gated_residual_bwd_triton(y, *inputs[1:], True, True)
        assert launched == ["_fwd_kernel", "_bwd_kernel"]
        launched.clear()


def test_rejects_what_does_not_fit():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"gated_residual: x \(2, 4\).*branch \(2, 3\)"):
        gated_residual(x, torch.zeros(2, 3), torch.zeros(1))
    with pytest.raises(ValueError, match=r"gated_residual: gate \(3,\).*x is \(2, 4\)"):
        gated_residual(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match="floating point"):
        gated_residual(x.int(), x.int(), torch.zeros(1))


# with its norm --------------------------------------------------------------------------------------------------------
NORMS = [("rms", False), ("rms", True), ("layer", True), ("layer", False)]  # kind, bias
ALL = (True,) * 5  # gradients of x, branch, gate, weight and bias


def _norm_inputs(shape, dtype, scalar, bias, device="cpu"):
    """x, branch, gate, weight, bias; wide enough that no row has a variance of nearly 0."""
    inputs = _inputs(shape, dtype, scalar, device)
    more = [(torch.randn(shape[-1]) * 0.3 + 1).to(device, dtype), torch.randn(shape[-1]).to(device, dtype)]
    return [*inputs, *more[: 1 + bias]]


def _norm_torch(kind, x, branch, gate, weight, bias=None):
    h = _torch(x, branch, gate)
    if kind == "layer":
        return h, F.layer_norm(h, weight.shape, weight, bias, 1e-5)
    y = F.rms_norm(h, weight.shape, weight, 1e-5)
    return h, y if bias is None else y + bias


@pytest.mark.parametrize("shape", [(3, 5, 33), (7, 64), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("kind, bias", NORMS)
def test_norm_matches_torch(shape, dtype, scalar, kind, bias):
    inputs = _norm_inputs(shape, dtype, scalar, bias)
    seeds = [torch.randn(shape) for _ in range(2)]
    results = []
    for wide in (dtype, torch.float64):
        leaves = [t.to(wide).requires_grad_() for t in inputs]
        outs = _norm_torch(kind, *leaves)
        results.append([*outs, *gradients(outs, leaves, seeds)])
    leaves = [strided(t).requires_grad_() for t in inputs]
    outs = gated_residual(*leaves, kind=kind)
    for g, s, o in zip([*outs, *gradients(outs, leaves, seeds)], *results, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


@pytest.mark.parametrize("shape", [(3, 33), (9, 64), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("kind, bias", NORMS[1:3])
def test_norm_triton_matches_reference(shape, dtype, scalar, kind, bias, device, guard, monkeypatch):
    monkeypatch.setattr(op, "_config", lambda n: {"BLOCK_M": 2, "BLOCK_N": 64, "num_warps": 4})
    inputs = _norm_inputs(shape, dtype, scalar, bias, device)
    options = (kind == "layer", 1e-5)
    wide = [t.double() for t in inputs]
    got = guard.run(op.gated_residual_norm_triton, *inputs, *options)
    want = op.gated_residual_norm_reference(*inputs, *options)
    exact = op.gated_residual_norm_reference(*wide, *options)
    for g, s, o in zip(got, want, exact, strict=True):
        assert_as_accurate(g, s, o, ulps=8)
    seeds = [torch.randn(shape).to(device, dtype) for _ in range(2)]
    saved = (want[0], *inputs[1:4], *want[2:], options[0])
    got = guard.run(op.gated_residual_norm_bwd_triton, *seeds, *saved, *ALL)
    want = op.gated_residual_norm_bwd_reference(*seeds, *saved, *ALL)
    double = (t.double() if isinstance(t, torch.Tensor) else t for t in (*seeds, *saved))
    for g, s, o in zip(got, want, op.gated_residual_norm_bwd_reference(*double, *ALL), strict=True):
        assert_as_accurate(g, s, o, ulps=8)


def test_norm_frozen_inputs_cost_no_gradient(device):
    inputs = _norm_inputs((3, 8), torch.float32, False, True, device)
    h, _, mean, rstd = op.gated_residual_norm_reference(*inputs, True, 1e-5)
    saved = (torch.ones_like(h), None, h, *inputs[1:4], mean, rstd, True)
    full = op.gated_residual_norm_bwd_reference(*saved, *ALL)
    for function in (op.gated_residual_norm_bwd_reference, op.gated_residual_norm_bwd_triton):
        for frozen in range(5):
            wanted = [i != frozen for i in range(5)]
            got = function(*saved, *wanted)
            for g, w, want in zip(got, full, wanted, strict=True):
                torch.testing.assert_close(g, w if want else w.new_empty(0), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_norm_of_which_one_output_is_used(used):
    inputs = _norm_inputs((4, 16), torch.float32, True, True)
    grads = []
    for function in (_norm_torch, lambda kind, *t: gated_residual(*t, kind=kind)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        grads.append(gradients([function("layer", *leaves)[used]], leaves, [torch.ones(4, 16)]))
    for want, got in zip(*grads, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_norm_same_result_twice(device):
    inputs = _norm_inputs((9, 33), torch.float32, False, True, device)
    outs = [op.gated_residual_norm_triton(*inputs, True, 1e-5) for _ in range(2)]
    saved = [(h, y, h, *inputs[1:4], mean, rstd, True, *ALL) for h, y, mean, rstd in outs]
    grads = [op.gated_residual_norm_bwd_triton(*s) for s in saved]
    for a, b in zip((*outs[0], *grads[0]), (*outs[1], *grads[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype, width", [(torch.float64, 8), (torch.float32, op.MAX_WIDTH + 1)])
def test_triton_hands_on_what_it_does_not_take(dtype, width, device):
    inputs = _norm_inputs((2, width), dtype, False, True, device)
    x, branch, gate = inputs[:3]
    y = op.gated_residual_triton(x, branch, gate)
    assert torch.equal(y, op.gated_residual_reference(x, branch, gate))
    got = op.gated_residual_bwd_triton(y, branch, gate, True, True)
    assert all(map(torch.equal, got, op.gated_residual_bwd_reference(y, branch, gate, True, True)))
    got = op.gated_residual_norm_triton(*inputs, True, 1e-5)
    assert all(map(torch.equal, got, op.gated_residual_norm_reference(*inputs, True, 1e-5)))
    saved = (y, None, got[0], branch, gate, inputs[3], *got[2:], True, *ALL)
    want = op.gated_residual_norm_bwd_reference(*saved)
    assert all(map(torch.equal, op.gated_residual_norm_bwd_triton(*saved), want))


def test_norm_backward_of_wide_rows_with_a_gate_a_channel(device):
    """The widest rows that the forward kernel takes; the backward hands them on."""
    inputs = _norm_inputs((1, op.MAX_WIDTH_NARROW + 1), torch.float32, False, False, device)
    h, y, mean, rstd = op.gated_residual_norm_reference(*inputs, None, False, 1e-5)
    saved = (y, None, h, *inputs[1:4], mean, rstd, False, *ALL)
    want = op.gated_residual_norm_bwd_reference(*saved)
    assert all(map(torch.equal, op.gated_residual_norm_bwd_triton(*saved), want))


@pytest.mark.parametrize("kind, bias", [("rms", False), ("layer", True)])
def test_norm_opcheck(kind, bias):
    inputs = [t.requires_grad_() for t in _norm_inputs((3, 8), torch.float32, True, bias)]
    arguments = (*inputs, *[None] * (not bias), kind == "layer", 1e-5)
    torch.library.opcheck(torch.ops.fastmllm.gated_residual_norm.default, arguments)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_compile(kind):
    inputs = [t.requires_grad_() for t in _norm_inputs((3, 8), torch.float32, False, False)]
    compiled = torch.compile(gated_residual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, kind=kind), gated_residual(*inputs, kind=kind))


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("kind, bias", NORMS)
def test_norm_gradcheck(scalar, kind, bias):
    inputs = [t.requires_grad_() for t in _norm_inputs((2, 5), torch.float64, scalar, bias)]
    assert torch.autograd.gradcheck(lambda *t: gated_residual(*t, kind=kind), inputs)


@pytest.mark.parametrize("kind, bias", NORMS)
def test_norm_one_launch_forward_one_backward_and_no_wait(kind, bias, monkeypatch):
    kernels = ["_norm_fwd_kernel", "_norm_bwd_kernel"]
    launched = _count_launches(monkeypatch, "_fwd_kernel", "_bwd_kernel", *kernels)
    for scalar in (False, True):
        x, branch, gate, weight, *shift = _norm_inputs((7, 64), torch.bfloat16, scalar, bias, "meta")
        centred = kind == "layer"
        h, y, *statistics = op.gated_residual_norm_triton(x, branch, gate, weight, *(shift or [None]), centred, 1e-5)
        assert launched == kernels[:1]
        wanted = (*ALL[:4], bias)
        op.gated_residual_norm_bwd_triton(y, h, h, branch, gate, weight, *statistics, centred, *wanted)
        assert launched == kernels
        launched.clear()


def test_norm_is_that_of_mllama():
    """The layer's own norm and gate: the sum, then MllamaTextRMSNorm of it."""
    modeling = pytest.importorskip("transformers.models.mllama.modeling_mllama")
    x, branch, gate, weight = _norm_inputs((5, 32), torch.float32, True, False)
    norm = modeling.MllamaTextRMSNorm(32, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(weight)
        want = x + gate.tanh() * branch
        torch.testing.assert_close(gated_residual(x, branch, gate, weight), (want, norm(want)))


def test_norm_rejects_what_does_not_fit():
    x, gate = torch.zeros(2, 4), torch.zeros(1)
    with pytest.raises(ValueError, match=r"gated_residual: norm_weight \(3,\).*x is \(2, 4\)"):
        gated_residual(x, x, gate, torch.zeros(3))
    with pytest.raises(ValueError, match=r"norm_bias \(4,\) torch.bfloat16"):
        gated_residual(x, x, gate, torch.zeros(4), torch.zeros(4).bfloat16())
    with pytest.raises(ValueError, match=r"norm_bias \(4,\) without norm_weight"):
        gated_residual(x, x, gate, norm_bias=torch.zeros(4))
    with pytest.raises(ValueError, match='kind \'batch\' must be "rms" or "layer"'):
        gated_residual(x, x, gate, torch.zeros(4), kind="batch")
