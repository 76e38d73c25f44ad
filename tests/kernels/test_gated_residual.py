"""gated_residual: the operator equals torch, Triton equals the operator, autograd and the dispatcher hold."""

from __future__ import annotations

import pytest
import torch
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


def test_rejects_what_does_not_fit():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"gated_residual: x \(2, 4\).*branch \(2, 3\)"):
        gated_residual(x, torch.zeros(2, 3), torch.zeros(1))
    with pytest.raises(ValueError, match=r"gated_residual: gate \(3,\).*x is \(2, 4\)"):
        gated_residual(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match="floating point"):
        gated_residual(x.int(), x.int(), torch.zeros(1))
