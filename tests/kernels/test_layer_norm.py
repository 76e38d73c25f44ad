"""layer_norm: the operator equals torch, Triton equals the operator, autograd and the dispatcher hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided
from torch.utils._python_dispatch import TorchDispatchMode

from fastmllm.kernels import _norm
from fastmllm.kernels import layer_norm as op
from fastmllm.kernels._norm import MAX_SCALED_WIDTH, MAX_WIDTH
from fastmllm.kernels.layer_norm import layer_norm

SHAPES = [(3, 5, 33), (7, 64), (1, 3), (0, 16)]
ADDED = ["plain", "residual", "scale"]  # x, residual + x, residual + scale * x


def _inputs(shape, dtype, added, device="cpu"):
    """Return x, weight, bias, residual, scale."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    r = torch.randn(shape, dtype=torch.float64) if added != "plain" else None
    w, b, s = (torch.randn(shape[-1], dtype=torch.float64) + offset for offset in (1, 0, 0.5))
    return [None if t is None else t.to(device, dtype) for t in (x, w, b, r, s if added == "scale" else None)]


def _torch(x, w, b, r, s, eps=1e-5):
    h = x if s is None else s * x
    h = h if r is None else h + r
    return F.layer_norm(h, w.shape, w, b, eps), h


def _ours(x, w, b, r, s):
    out = layer_norm(x, w, b, r, scale=s)
    return out if r is not None else (out,)


def _wide(tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def _gradients(outputs, leaves, seeds):
    """Return one gradient or None for each leaf or None."""
    grads = iter(gradients(outputs, [t for t in leaves if t is not None], seeds[: len(outputs)]))
    return [None if t is None else next(grads) for t in leaves]


def _assert_all_as_accurate(got, same_dtype, oracle):
    for g, s, o in zip(got, same_dtype, oracle, strict=True):
        if o is not None:
            assert_as_accurate(g, s, o, ulps=8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("added", ADDED)
def test_matches_torch(shape, dtype, added):
    inputs = _inputs(shape, dtype, added)
    seeds = [torch.randn(shape), torch.randn(shape)]

    def run(function, tensors):
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        outputs = function(*leaves)[: 1 if leaves[3] is None else 2]
        return [*outputs, *_gradients(outputs, leaves, seeds)]

    awkward = [None if t is None else strided(t) for t in inputs]
    _assert_all_as_accurate(run(_ours, awkward), run(_torch, inputs), run(_torch, _wide(inputs)))


@pytest.mark.parametrize("added", ADDED)
def test_half_rows_with_fp32_weights(added):
    """Mixed precision; the gradients have the dtypes of what they belong to."""
    inputs = _inputs((5, 33), torch.bfloat16, added)
    leaves = [None if t is None else (t if t.dim() > 1 else t.float()).requires_grad_() for t in inputs]
    outputs = _ours(*leaves)
    grads = _gradients(outputs, leaves, [torch.ones(5, 33)] * 2)
    assert [g.dtype for g in grads if g is not None] == [t.dtype for t in leaves if t is not None]
    for got, want in zip(outputs, _torch(*_wide(inputs)), strict=False):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=1e-2)


def _backward_args(inputs, added, forward):
    """Return the arguments of the backward after a forward that gave y, h, mean, rstd."""
    x, w, _, r, s = inputs
    grad_y = torch.randn(x.shape).to(x)
    grad_h = None if r is None else torch.randn(x.shape).to(x)
    h = x if r is None else forward[1]
    return grad_y, grad_h, h, x if added == "scale" else None, w, s, forward[2], forward[3], True, True


@pytest.mark.parametrize("shape", [(3, 33), (5, 64), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", ADDED)
def test_triton_matches_reference(shape, dtype, added, device, guard):
    inputs = _inputs(shape, dtype, added, device)
    want = op.layer_norm_reference(*inputs, 1e-5)
    got = guard.run(op.layer_norm_triton, *inputs, 1e-5)
    _assert_all_as_accurate(got, want, op.layer_norm_reference(*_wide(inputs), 1e-5))
    args = _backward_args(inputs, added, want)
    got = guard.run(op.layer_norm_bwd_triton, *args)
    _assert_all_as_accurate(got, op.layer_norm_bwd_reference(*args), op.layer_norm_bwd_reference(*_wide(args)))


def test_triton_with_more_rows_than_the_programs_take_at_once(device, guard):
    """Two programs of the backward walk over their rows; their parts of the sums are added."""
    inputs = _inputs((2300, 3), torch.float32, "scale", device)
    want = op.layer_norm_reference(*inputs, 1e-5)
    got = guard.run(op.layer_norm_triton, *inputs, 1e-5)
    _assert_all_as_accurate(got, want, op.layer_norm_reference(*_wide(inputs), 1e-5))
    args = _backward_args(inputs, "scale", want)
    got = guard.run(op.layer_norm_bwd_triton, *args)
    _assert_all_as_accurate(got, op.layer_norm_bwd_reference(*args), op.layer_norm_bwd_reference(*_wide(args)))


@pytest.mark.parametrize("implementation", ["triton", "cpu"])
def test_a_row_depends_on_no_other_and_a_result_on_no_run(implementation, device):
    forward, backward = (
        (op.layer_norm_triton, op.layer_norm_bwd_triton)
        if implementation == "triton"
        else (torch.ops.fastmllm.layer_norm, torch.ops.fastmllm.layer_norm_bwd)
    )
    inputs = _inputs((11, 33), torch.bfloat16, "scale", device if implementation == "triton" else "cpu")
    whole = forward(*inputs, 1e-5)
    args = _backward_args(inputs, "scale", whole)
    grads = backward(*args)
    assert all(torch.equal(a, b) for a, b in zip(whole, forward(*inputs, 1e-5), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, backward(*args), strict=True))
    x, w, b, r, s = inputs
    for a, part in zip(whole, forward(x[7:9], w, b, r[7:9], s, 1e-5), strict=True):
        assert torch.equal(a[7:9], part)
    grad_y, grad_h, h, _, _, _, mean, rstd, _, _ = (t[7:9] if isinstance(t, torch.Tensor) else t for t in args)
    for a, part in zip(grads[:2], backward(grad_y, grad_h, h, x[7:9], w, s, mean, rstd, True, True)[:2], strict=True):
        assert torch.equal(a[7:9], part)


def test_one_kernel_each_way_and_no_read_of_the_device(monkeypatch):
    """On a GPU: one launch forward; backward one, the sum of the parts, and a copy for each gradient of a weight."""
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: calls.append(self.name)

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not (function.is_view or "empty" in function.name()):
                calls.append(function.name())
            return function(*args, **(kwargs or {}))

    for name in ("_fwd_kernel", "_bwd_kernel"):
        monkeypatch.setattr(_norm, name, Recorder(name))
    inputs = _inputs((9, 33), torch.bfloat16, "scale")
    args = _backward_args(inputs, "scale", op.layer_norm_reference(*inputs, 1e-5))
    with Operators():
        op.layer_norm_triton(*inputs, 1e-5)
        op.layer_norm_bwd_triton(*args)
    assert calls == ["_fwd_kernel", "_bwd_kernel", "aten::sum.dim_IntList", *["aten::_to_copy"] * 3]


def test_triton_backward_of_a_stride_0_gradient(device):
    """`.sum().backward()` hands the backward an expanded scalar."""
    x, w, b, _, _ = _inputs((3, 33), torch.float32, "plain", device)
    _, _, mean, rstd = op.layer_norm_reference(x, w, b, None, None, 1e-5)
    grad = torch.ones((), device=device).expand(3, 33)
    rest = None, x, None, w, None, mean, rstd, True, True
    got = op.layer_norm_bwd_triton(grad, *rest)
    for g, s in zip(got, op.layer_norm_bwd_reference(grad.contiguous(), *rest), strict=True):
        torch.testing.assert_close(g, s, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 8), (torch.float32, MAX_WIDTH + 1)])
def test_what_the_kernels_do_not_take_goes_to_the_reference(dtype, width, device):
    inputs = _inputs((2, width), dtype, "scale", device)
    got, want = op.layer_norm_triton(*inputs, 1e-5), op.layer_norm_reference(*inputs, 1e-5)
    fake = torch.ops.fastmllm.layer_norm(*[t.to("meta") for t in inputs], 1e-5)
    for g, s, f in zip(got, want, fake, strict=True):
        torch.testing.assert_close(g, s, rtol=0, atol=0)
        assert (g.dtype, g.shape) == (f.dtype, f.shape)
    args = _backward_args(inputs, "scale", want)
    if dtype == torch.float32:  # the widest backward with LayerScale is narrower
        args = [
            t[..., : MAX_SCALED_WIDTH + 1] if isinstance(t, torch.Tensor) and t.shape[-1] == width else t for t in args
        ]
    for g, s in zip(op.layer_norm_bwd_triton(*args), op.layer_norm_bwd_reference(*args), strict=True):
        torch.testing.assert_close(g, s, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [(0, 1, 2), (1, 0, 2)])
@pytest.mark.parametrize("added", ["residual", "scale"])
def test_outputs_have_the_layout_that_the_fake_promises(layout, added):
    x, w, _, r, s = _inputs((3, 4, 8), torch.float32, added)
    args = x.permute(layout), w, None, r.permute(layout), s, 1e-5
    torch.library.opcheck(torch.ops.fastmllm.layer_norm.default, args, test_utils="test_faketensor")
    assert all(t.is_contiguous() for t in (*torch.ops.fastmllm.layer_norm(*args), *op.layer_norm_reference(*args)))


def test_what_is_frozen_costs_no_gradient():
    x, w, b, r, s = _inputs((4, 8), torch.float32, "scale")
    y, h = layer_norm(x.requires_grad_(), w, b, r, scale=s)
    saved = y.grad_fn.saved_tensors
    assert saved[1] is None, "x is kept for the gradient of scale alone"
    (y.sum() + h.sum()).backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(sum(t.sum() for t in _torch(x, w, b, r, s)), x)[0])
    stats = op.layer_norm_reference(r, w, b, None, None, 1e-5)[2:]
    for run in (torch.ops.fastmllm.layer_norm_bwd, op.layer_norm_bwd_reference):
        _, dx, dw, db, dscale = run(torch.ones_like(r), None, r, None, w, None, *stats, False, False)
        assert dx.numel() == dw.numel() == db.numel() == dscale.numel() == 0


@pytest.mark.parametrize("frozen", [0, 1, 2, 3, 4])
def test_any_input_may_be_frozen(frozen):
    inputs = _inputs((3, 5), torch.float64, "scale")
    leaves = [t.requires_grad_() if i != frozen else t for i, t in enumerate(inputs)]
    learned = [t for t in leaves if t.requires_grad]
    grads = [torch.autograd.grad(sum((t * t).sum() for t in f(*leaves)), learned) for f in (_ours, _torch)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("added", ADDED)
def test_opcheck(added):
    inputs = [None if t is None else t.requires_grad_() for t in _inputs((3, 8), torch.float32, added)]
    torch.library.opcheck(torch.ops.fastmllm.layer_norm.default, (*inputs, 1e-5))
    args = _backward_args(inputs, added, [t.detach() for t in op.layer_norm_reference(*inputs, 1e-5)])
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    torch.library.opcheck(torch.ops.fastmllm.layer_norm_bwd.default, args)


@pytest.mark.parametrize("added", ADDED)
def test_compile(added):
    inputs = [None if t is None else t.requires_grad_() for t in _inputs((3, 8), torch.float32, added)]
    compiled = torch.compile(_ours, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), _ours(*inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("added", ADDED)
def test_gradcheck(added):
    inputs = [None if t is None else t.requires_grad_() for t in _inputs((2, 5), torch.float64, added)]
    given = [i for i, t in enumerate(inputs) if t is not None]
    places = {place: i for i, place in enumerate(given)}
    assert torch.autograd.gradcheck(
        lambda *t: _ours(*[t[places[i]] if i in places else None for i in range(5)]), [inputs[i] for i in given]
    )


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
    with pytest.raises(ValueError, match=r"layer_norm: scale \(3,\) torch.float32 and weight \(4,\)"):
        layer_norm(x, w, residual=x, scale=torch.ones(3))
    with pytest.raises(ValueError, match=r"layer_norm: scale \(4,\) .*give the residual"):
        layer_norm(x, w, scale=w)
    with pytest.raises(ValueError, match=r"x torch.int32 .*floating point"):
        layer_norm(x.int(), w)
    with pytest.raises(ValueError, match=r"weight torch.int32 must be floating point"):
        layer_norm(x, w.int())
    far = w.to("meta")
    for name, others in (("weight", (far,)), ("bias", (w, far)), ("residual", (w, w, x.to("meta")))):
        with pytest.raises(ValueError, match=rf"x \(2, 4\) is on cpu, but {name} \(.*4,?\) is on meta"):
            layer_norm(x, *others)
    with pytest.raises(ValueError, match=r"but scale \(4,\) is on meta"):
        layer_norm(x, w, residual=x, scale=far)
