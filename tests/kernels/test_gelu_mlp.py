"""gelu_mlp: the operator equals torch, Triton equals the operator, and only what is said is kept for the backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from launches import Launches
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import gelu_mlp as op
from fastmllm.kernels.gelu_mlp import ACTIVATIONS, gelu_mlp

SHAPES = [((3, 5, 7), 33, 6), ((4, 16), 64, 16), ((1, 3), 5, 2), ((0, 4), 8, 4)]  # x, F, E
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
ACTS = pytest.mark.parametrize("approximate", ACTIVATIONS)


def _inputs(shape, dtype, bias=True, device="cpu"):
    x, hidden, width = shape
    torch.manual_seed(0)
    shapes = x, (hidden, x[-1]), (hidden,), (width, hidden), (width,)
    scales = 1, x[-1] ** -0.5 * 2, 1, hidden**-0.5, 1
    tensors = [(s * torch.randn(n)).to(device, dtype) for n, s in zip(shapes, scales, strict=True)]
    return tensors if bias else [tensors[0], tensors[1], None, tensors[3], None]


def _torch(x, weight1, bias1, weight2, bias2, approximate):
    hidden = F.linear(x, weight1, bias1)
    hidden = (
        hidden * torch.sigmoid(1.702 * hidden) if approximate == "quick" else F.gelu(hidden, approximate=approximate)
    )
    return F.linear(hidden, weight2, bias2)


def _leaves(tensors, change=lambda t: t):
    return [None if t is None else change(t).detach().requires_grad_() for t in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
@ACTS
@pytest.mark.parametrize("bias", [False, True])
def test_matches_torch(shape, dtype, approximate, bias):
    inputs = _inputs(shape, dtype, bias)
    seed = torch.randn(*shape[0][:-1], shape[2])
    results = []
    for kind in (dtype, torch.float64):
        leaves = _leaves(inputs, lambda t, kind=kind: t.to(kind))
        out = _torch(*leaves, approximate)
        results.append([out, *gradients([out], [t for t in leaves if t is not None], [seed])])
    leaves = _leaves(inputs, strided)
    out = gelu_mlp(*leaves, approximate)
    got = [out, *gradients([out], [t for t in leaves if t is not None], [seed])]
    for g, s, o in zip(got, *results, strict=True):
        assert_as_accurate(g, s, o, ulps=8)
    with torch.no_grad():
        assert_as_accurate(gelu_mlp(*leaves, approximate), results[0][0], results[1][0], ulps=8)


@pytest.mark.parametrize("shape", [(3, 33), (9, 600), (0, 8)])
@DTYPES
@ACTS
@pytest.mark.parametrize("bias", [False, True])
def test_triton_matches_reference(shape, dtype, approximate, bias, device, guard):
    torch.manual_seed(0)
    hidden, grad = ((3 * torch.randn(shape)).to(device, dtype) for _ in range(2))
    b = torch.randn(shape[1]).to(device, dtype) if bias else None
    wide = [None if t is None else t.double() for t in (hidden, b)]
    for reuse in (False, True):
        got = guard.run(op.bias_gelu_triton, hidden.clone(), b, approximate, reuse)
        want = op.bias_gelu_reference(hidden.clone(), b, approximate, reuse)
        assert_as_accurate(got, want, op.bias_gelu_reference(*[w if w is None else w.clone() for w in wide],
                                                             approximate, reuse), ulps=8)  # fmt: skip
    got = guard.run(op.bias_gelu_bwd_triton, grad, hidden, b, approximate, True, True)
    want = op.bias_gelu_bwd_reference(grad, hidden, b, approximate, True, True)
    exact = op.bias_gelu_bwd_reference(grad.double(), *wide, approximate, True, True)
    for g, s, o in zip(got, want, exact, strict=True):
        assert_as_accurate(g, s, o, ulps=8)
    for activation, bias_grad in ((False, True), (True, False), (False, False)):
        part = guard.run(op.bias_gelu_bwd_triton, grad, hidden, b, approximate, activation, bias_grad)
        for p, g, wanted in zip(part, got, (True, activation, bias_grad), strict=True):
            assert torch.equal(p, g) if wanted else p.numel() == 0


@ACTS
def test_triton_operator_matches_reference(approximate, device):
    inputs = _inputs(SHAPES[0], torch.float32, device=device)
    for keep in (True, False):
        got, want = (f(*inputs, approximate, keep) for f in (op.gelu_mlp_triton, op.gelu_mlp_reference))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
    hidden = op.gelu_mlp_reference(*inputs, approximate, True)[1]
    before = hidden.clone()
    args = torch.ones((), device=device).expand(3, 5, 6), inputs[0], hidden, *inputs[1:4], approximate  # stride 0
    for needs in ([True] * 5, [True] + 4 * [False], [False, False, False, True, False]):
        for g, w in zip(op.gelu_mlp_bwd_triton(*args, needs), op.gelu_mlp_bwd_reference(*args, needs), strict=True):
            torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)
    assert torch.equal(hidden, before)


@ACTS
def test_triton_is_finite_far_out(approximate, device):
    z = torch.tensor([[-1e4, -300.0, -30.0, -8.0, -1e-6, 0.0, 1e-6, 8.0, 30.0, 300.0, 1e4]], device=device)
    one = torch.ones_like(z)
    torch.testing.assert_close(
        op.bias_gelu_triton(z, None, approximate, False), op.bias_gelu_reference(z, None, approximate, False)
    )
    got = op.bias_gelu_bwd_triton(one.clone(), z, None, approximate, False, False)[0]
    want = op.bias_gelu_bwd_reference(one.double(), z.double(), None, approximate, False, False)[0]
    torch.testing.assert_close(got, want.float(), atol=2e-6, rtol=1e-6)


def test_triton_bias_gradient_of_many_rows_is_the_same_twice(device):
    torch.manual_seed(0)
    grad, hidden = torch.randn(2, 18, 600, device=device).unbind(0)
    results = [op.bias_gelu_bwd_triton(grad.clone(), hidden, None, "tanh", False, True) for _ in range(2)]
    want = op.bias_gelu_bwd_reference(grad, hidden, None, "tanh", False, True)
    for a, b, w in zip(*results, want, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, w, atol=1e-5, rtol=1e-5)
    rows = op.bias_gelu_triton(hidden, None, "tanh", False)
    assert torch.equal(rows[3:5], op.bias_gelu_triton(hidden[3:5].clone(), None, "tanh", False))  # no neighbours


def test_fp64_goes_to_the_reference(device):
    inputs = _inputs(SHAPES[0], torch.float64, device=device)
    got, want = op.gelu_mlp_triton(*inputs, "none", True), op.gelu_mlp_reference(*inputs, "none", True)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    args = got[0], inputs[0], got[1], *inputs[1:4], "none", [True] * 5
    for g, w in zip(op.gelu_mlp_bwd_triton(*args), op.gelu_mlp_bwd_reference(*args), strict=True):
        assert torch.equal(g, w)


def _saved(inputs, learning):
    """Return how many numbers beyond the parameters are kept for the backward, one count a tensor."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    leaves = [t.detach().requires_grad_(i in learning) for i, t in enumerate(inputs)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = gelu_mlp(*leaves)
    parameters = {t.data_ptr() for t in leaves[1:]}
    return [t.numel() for t in kept if t.data_ptr() not in parameters and t.numel()], out, leaves


@pytest.mark.parametrize(("learning", "kept"), [
    ((0, 1, 2, 3, 4), [15 * 7, 15 * 33]), ((0,), [15 * 33]), ((3,), [15 * 33]), ((1,), [15 * 7, 15 * 33]), ((4,), []),
])  # fmt: skip
def test_what_is_kept(learning, kept):
    """x and the hidden layer, never the activation; x only for weight1, nothing for bias2 alone."""
    numbers, out, leaves = _saved(_inputs(SHAPES[0], torch.float32), learning)
    assert numbers == kept
    out.sum().backward()
    assert [t.grad is not None for t in leaves] == [i in learning for i in range(5)]


def test_frozen_weights_cost_no_product():
    inputs = _inputs(SHAPES[0], torch.float32)
    hidden = op.gelu_mlp_reference(*inputs, "none", True)[1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        grads = op.gelu_mlp_bwd_reference(
            torch.randn(3, 5, 6), None, hidden, *inputs[1:4], "none", [True] + 4 * [False]
        )
    assert [g.numel() for g in grads] == [105, 0, 0, 0, 0]
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::mm") == 2


def test_nothing_is_kept_without_autograd():
    inputs = _inputs(SHAPES[0], torch.float32)
    assert torch.ops.fastmllm.gelu_mlp(*inputs, "none", False)[1].numel() == 0
    before = [t.clone() for t in inputs]
    gelu_mlp(*inputs)
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    inputs = _leaves(_inputs(SHAPES[1], torch.float32, bias))
    for keep in (False, True):
        utils = ("test_schema", "test_faketensor") if not keep else ("test_schema", "test_faketensor",
                                                                     "test_autograd_registration",
                                                                     "test_aot_dispatch_dynamic")  # fmt: skip
        torch.library.opcheck(torch.ops.fastmllm.gelu_mlp.default, (*inputs, "tanh", keep), test_utils=utils)
    x, weight1, bias1, weight2, _ = (None if t is None else t.detach() for t in inputs)
    args = torch.randn(4, 16), x, torch.randn(4, 64), weight1, bias1, weight2, "tanh"
    for needs in ([True, True, bias, True, bias], [True, False, False, False, False]):
        torch.library.opcheck(torch.ops.fastmllm.gelu_mlp_bwd.default, (*args, needs))


def test_compile():
    compiled = torch.compile(gelu_mlp, fullgraph=True, backend="aot_eager")
    results = []
    for function in (gelu_mlp, compiled):
        leaves = _leaves(_inputs(SHAPES[0], torch.float32))
        out = function(*leaves, "quick")
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves, "quick"), gelu_mlp(*leaves, "quick"))


@ACTS
def test_gradcheck(approximate):
    leaves = _leaves(_inputs(((2, 3), 4, 2), torch.float64))
    assert torch.autograd.gradcheck(lambda *t: gelu_mlp(*t, approximate), leaves)
    x, weight1, _, weight2, _ = leaves
    assert torch.autograd.gradcheck(
        lambda *t: gelu_mlp(t[0], t[1], None, t[2], None, approximate), (x, weight1, weight2)
    )


def test_rejects_what_does_not_fit():
    x, weight1, bias1, weight2, bias2 = _inputs(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match=r"gelu_mlp: x \(4, 15\), weight1 \(64, 16\) and weight2 \(16, 64\)"):
        gelu_mlp(x[:, 1:], weight1, bias1, weight2, bias2)
    with pytest.raises(ValueError, match=r"gelu_mlp: .*weight2 \(64, 16\) must be"):
        gelu_mlp(x, weight1, bias1, weight2.t(), bias2)
    with pytest.raises(ValueError, match=r"gelu_mlp: bias1 \(16,\) must be \(64,\)"):
        gelu_mlp(x, weight1, bias2, weight2, bias2)
    with pytest.raises(ValueError, match=r"approximate 'relu' must be one of"):
        gelu_mlp(x, weight1, bias1, weight2, bias2, "relu")
    with pytest.raises(ValueError, match=r"x is torch.float32 on cpu, but weight2 is torch.bfloat16"):
        gelu_mlp(x, weight1, bias1, weight2.bfloat16(), bias2)
    with pytest.raises(ValueError, match=r"but bias2 is torch.float32 on meta"):
        gelu_mlp(x, weight1, bias1, weight2, bias2.to("meta"))
    with pytest.raises(ValueError, match="floating point"):
        gelu_mlp(*(t.int() for t in (x, weight1, bias1, weight2, bias2)))


def test_launches_and_no_wait():
    """One kernel between two products; backward one kernel, four products, and the sums of the two biases."""
    x, w1, b1, w2, b2 = _inputs(SHAPES[0], torch.bfloat16, True, "meta")
    with Launches(op, "_fwd_kernel", "_bwd_kernel") as launches:
        y, hidden = op.gelu_mlp_triton(x, w1, b1, w2, b2, "none", True)
        assert launches.take() == ["mm", "_fwd_kernel", "addmm"]
        op.gelu_mlp_bwd_triton(y, x, hidden, w1, b1, w2, "none", [True] * 5)
        took = launches.take()
        assert [took.count(name) for name in ("_fwd_kernel", "_bwd_kernel", "mm")] == [0, 1, 4]
        assert len(took) == 1 + 4 + 3, f"{took}: two sums and the cast of one beside"
        op.gelu_mlp_bwd_triton(y, None, hidden, w1, b1, w2, "none", [True, False, False, False, False])
        assert sorted(launches.take()) == ["_bwd_kernel", "mm", "mm"]
