"""layer_norm: the operator equals torch, Triton equals the operator, autograd and the dispatcher hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import layer_norm as op
from fastmllm.kernels.layer_norm import layer_norm

SHAPES = [(3, 5, 33), (7, 64), (1, 3), (0, 16)]


def _inputs(shape, dtype, residual, device="cpu"):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    r = torch.randn(shape, dtype=torch.float64) if residual else None
    w, b = torch.randn(shape[-1], dtype=torch.float64) + 1, torch.randn(shape[-1], dtype=torch.float64)
    return [None if t is None else t.to(device, dtype) for t in (x, w, b, r)]


def _torch(x, w, b, r, eps=1e-5):
    h = x if r is None else x + r
    return F.layer_norm(h, w.shape, w, b, eps), h


def _check(dtype, got, inputs, seeds, compute):
    """Compare outputs or gradients with torch in the same dtype, both against fp64."""
    wide = [None if t is None else t.double() for t in inputs]
    for a, s, o in zip(got, compute(inputs, seeds), compute(wide, seeds), strict=True):
        if o is not None:
            assert_as_accurate(a, s, o, ulps=8)


def _torch_outputs(inputs, seeds):
    return _torch(*inputs)


def _torch_gradients(inputs, seeds):
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    outputs = _torch(*leaves)[: 2 if leaves[3] is not None else 1]
    grads = iter(gradients(outputs, [t for t in leaves if t is not None], seeds[: len(outputs)]))
    return [None if t is None else next(grads) for t in leaves]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_matches_torch(shape, dtype, residual):
    inputs = _inputs(shape, dtype, residual)
    seeds = [torch.randn(shape), torch.randn(shape)]
    leaves = [None if t is None else strided(t).requires_grad_() for t in inputs]
    out = layer_norm(*leaves)
    outputs = out if residual else (out,)
    _check(dtype, outputs, inputs, seeds, lambda i, s: _torch_outputs(i, s)[: len(outputs)])
    grads = iter(gradients(outputs, [t for t in leaves if t is not None], seeds[: len(outputs)]))
    _check(dtype, [None if t is None else next(grads) for t in leaves], inputs, seeds, _torch_gradients)


@pytest.mark.parametrize("shape", [(3, 33), (5, 64), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_triton_matches_reference(shape, dtype, residual, device, guard):
    x, w, _, r = inputs = _inputs(shape, dtype, residual, device)
    got = guard.run(op.layer_norm_triton, *inputs, 1e-5)
    want = op.layer_norm_reference(*inputs, 1e-5)
    wide = op.layer_norm_reference(*[None if t is None else t.double() for t in inputs], 1e-5)
    for g, s, o in zip(got, want, wide, strict=True):
        assert_as_accurate(g, s, o, ulps=8)
    h = r + x if residual else x
    dy, dh = torch.randn(shape).to(device, dtype), torch.randn(shape).to(device, dtype) if residual else None
    mean, rstd = want[2], want[3]
    got = guard.run(op.layer_norm_bwd_triton, dy, dh, h, w, mean, rstd, True)
    want = op.layer_norm_bwd_reference(dy, dh, h, w, mean, rstd, True)
    wide = op.layer_norm_bwd_reference(*[None if t is None else t.double() for t in (dy, dh, h, w, mean, rstd)], True)
    for g, s, o in zip(got, want, wide, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


def test_triton_backward_of_a_stride_0_gradient(device):
    """`.sum().backward()` hands the backward an expanded scalar."""
    x, w, b, _ = _inputs((3, 33), torch.float32, False, device)
    _, _, mean, rstd = op.layer_norm_reference(x, w, b, None, 1e-5)
    grad = torch.ones((), device=device).expand(3, 33)
    got = op.layer_norm_bwd_triton(grad, None, x, w, mean, rstd, True)
    want = op.layer_norm_bwd_reference(grad.contiguous(), None, x, w, mean, rstd, True)
    for g, s in zip(got, want, strict=True):
        torch.testing.assert_close(g, s, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 8), (torch.float32, op.MAX_WIDTH + 1)])
def test_what_the_kernels_do_not_take_goes_to_the_reference(dtype, width, device):
    x, w, b, r = _inputs((2, width), dtype, True, device)
    got, want = op.layer_norm_triton(x, w, b, r, 1e-5), op.layer_norm_reference(x, w, b, r, 1e-5)
    fake = torch.ops.fastmllm.layer_norm(*[t.to("meta") for t in (x, w, b, r)], 1e-5)
    for g, s, f in zip(got, want, fake, strict=True):
        torch.testing.assert_close(g, s, rtol=0, atol=0)
        assert (g.dtype, g.shape) == (f.dtype, f.shape)
    args = x, r, got[1], w, got[2], got[3], True
    for g, s in zip(op.layer_norm_bwd_triton(*args), op.layer_norm_bwd_reference(*args), strict=True):
        torch.testing.assert_close(g, s, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [(0, 1, 2), (1, 0, 2)])
def test_outputs_have_the_layout_that_the_fake_promises(layout):
    x, w, _, r = _inputs((3, 4, 8), torch.float32, True)
    x, r = x.permute(layout), r.permute(layout)
    torch.library.opcheck(torch.ops.fastmllm.layer_norm.default, (x, w, None, r, 1e-5), test_utils="test_faketensor")
    assert all(t.is_contiguous() for t in torch.ops.fastmllm.layer_norm(x, w, None, r, 1e-5))


def test_frozen_weights_cost_no_gradient():
    x, w, b, _ = _inputs((4, 8), torch.float32, False)
    x.requires_grad_()
    layer_norm(x, w, b).sum().backward()
    assert x.grad is not None
    h = x.detach()
    mean, rstd = op.layer_norm_reference(h, w, b, None, 1e-5)[2:]
    _, dw, db = torch.ops.fastmllm.layer_norm_bwd(torch.ones_like(h), None, h, w, mean, rstd, False)
    assert dw.numel() == db.numel() == 0


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual):
    inputs = [None if t is None else t.requires_grad_() for t in _inputs((3, 8), torch.float32, residual)]
    torch.library.opcheck(torch.ops.fastmllm.layer_norm.default, (*inputs, 1e-5))


@pytest.mark.parametrize("residual", [False, True])
def test_compile(residual):
    inputs = [None if t is None else t.requires_grad_() for t in _inputs((3, 8), torch.float32, residual)]
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), layer_norm(*inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck():
    x, w, b, r = (t.requires_grad_() for t in _inputs((2, 5), torch.float64, True))
    assert torch.autograd.gradcheck(layer_norm, (x, w, b, r))
    assert torch.autograd.gradcheck(lambda x, w: layer_norm(x, w), (x, w))


def test_rejects_what_does_not_fit():
    x, w = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"layer_norm: weight \(3,\).*x is \(2, 4\)"):
        layer_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"layer_norm: bias \(3,\)"):
        layer_norm(x, w, torch.ones(3))
    with pytest.raises(ValueError, match=r"layer_norm: x \(2, 4\).*residual \(1, 4\)"):
        layer_norm(x, w, residual=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"layer_norm: bias \(4,\) torch.float64 and weight \(4,\) torch.float32"):
        layer_norm(x, w, w.double())
    with pytest.raises(ValueError, match=r"x torch.int32 .*floating point"):
        layer_norm(x.int(), w)
    with pytest.raises(ValueError, match=r"weight torch.int32 must be floating point"):
        layer_norm(x, w.int())
    for name, others in (("weight", (w.to("meta"),)), ("bias", (w, w.to("meta"))), ("residual", (w, w, x.to("meta")))):
        with pytest.raises(ValueError, match=rf"x \(2, 4\) is on cpu, but {name} \(.*4,?\) is on meta"):
            layer_norm(x, *others)
