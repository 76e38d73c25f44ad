"""linear_cross_entropy: equals torch, skips ignored rows, Triton equals the operator, autograd and dispatcher hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided
from torch.utils._python_dispatch import TorchDispatchMode

from fastmllm.kernels import linear_cross_entropy as op
from fastmllm.kernels.linear_cross_entropy import linear_cross_entropy

SHAPES = [(7, 24, 37), (1, 16, 64), (0, 8, 16)]  # T, D, V


def _inputs(shape, dtype, device="cpu", ignored=3):
    torch.manual_seed(0)
    t, d, v = shape
    hidden, weight = torch.randn(t, d, dtype=torch.float64), torch.randn(v, d, dtype=torch.float64) / d**0.5
    labels = torch.randint(0, v, (t,))
    labels[1::ignored] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def _torch(hidden, weight, labels, reduction):
    """F.cross_entropy in fp32 on logits of the input dtype; the empty mean is 0."""
    logits = F.linear(hidden, weight)
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, labels, reduction="none" if reduction == "none" else "sum")
    return total / (labels >= 0).sum().clamp(min=1) if reduction == "mean" else total


def _loss_and_gradients(function, hidden, weight, labels, reduction, seed, frozen=False):
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)]
    loss = function(*leaves, labels, reduction)
    return loss.detach(), *gradients([loss], [t for t in leaves if t.requires_grad], [seed.to(loss.device)])


def _ours(hidden, weight, labels, reduction, **options):
    return linear_cross_entropy(hidden, weight, labels, reduction=reduction, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_matches_torch(shape, dtype, reduction, frozen):
    hidden, weight, labels = _inputs(shape, dtype)
    seed = torch.randn(labels.shape if reduction == "none" else ())
    got = _loss_and_gradients(_ours, strided(hidden), strided(weight), labels, reduction, seed, frozen)
    same = _loss_and_gradients(_torch, hidden, weight, labels, reduction, seed, frozen)
    wide = _loss_and_gradients(_torch, hidden.double(), weight.double(), labels, reduction, seed, frozen)
    assert got[0].dtype == torch.float32
    for g, s, o in zip(got, same, wide, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


def test_several_chunks_equal_one(monkeypatch):
    hidden, weight, labels = _inputs((11, 8, 16), torch.float32)
    seed = torch.tensor(0.7)
    want = [_loss_and_gradients(_ours, hidden, weight, labels, "sum", seed, frozen) for frozen in (False, True)]
    monkeypatch.setattr(op, "CHUNK", 32)  # two rows at a time
    got = [_loss_and_gradients(_ours, hidden, weight, labels, "sum", seed, frozen) for frozen in (False, True)]
    for g, w in zip([t for r in got for t in r], [t for r in want for t in r], strict=True):
        torch.testing.assert_close(g, w)


class _Products(TorchDispatchMode):
    """Count the rows that matrix products see."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            self.shapes.append(tuple(args[-2].shape))
        return function(*args, **(kwargs or {}))


def test_ignored_rows_meet_no_product_and_a_frozen_head_costs_two():
    hidden, weight, labels = _inputs((12, 8, 32), torch.float32)
    labels[:9] = -100
    kept = int((labels != -100).sum())
    with _Products() as products:
        op.linear_cross_entropy_reference(hidden, weight, labels, -100, None, True, True)
    assert products.shapes == [(kept, 8), (kept, 32)]
    with _Products() as products:
        lse = torch.ones(12)
        op.linear_cross_entropy_bwd_reference(torch.ones(()), hidden, weight, labels, lse, -100, None, True, False)
    assert products.shapes == [(kept, 8), (kept, 32)]
    frozen = op.linear_cross_entropy_bwd_reference(torch.ones(()), hidden, weight, labels, lse, -100, None, True, False)
    assert frozen[1].numel() == 0


def test_padding_is_never_read():
    hidden, weight, labels = _inputs((7, 24, 37), torch.float32)
    poisoned = torch.where((labels == -100)[:, None], float("nan"), hidden)
    want = _loss_and_gradients(_ours, hidden, weight, labels, "mean", torch.ones(()))
    got = _loss_and_gradients(_ours, poisoned, weight, labels, "mean", torch.ones(()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=0, rtol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("num_targets", [None, 0])
def test_nothing_to_score_is_zero(reduction, frozen, num_targets):
    hidden, weight, labels = _inputs((5, 8, 16), torch.float32)
    labels.fill_(-100)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, num_targets=num_targets)
    loss.sum().backward()
    assert not loss.any()
    assert not hidden.grad.any()
    assert frozen or not weight.grad.any()


@pytest.mark.parametrize(
    "shape", [(20, 40, 70), (3, 16, 130), (0, 16, 32)]
)  # odd vocabulary, odd width, two row blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", [False, True])
def test_triton_matches_reference(shape, dtype, reduce, device, guard, monkeypatch):
    small = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(op, "_config", lambda n, d, dtype: {"EVEN_K": d % 16 == 0, **small})
    hidden, weight, labels = inputs = _inputs(shape, dtype, device, ignored=7)
    wide = (hidden.double(), weight.double(), labels)
    options = (-100, None, reduce, dtype == torch.float32)
    got = guard.run(op.linear_cross_entropy_triton, *inputs, *options)
    want = op.linear_cross_entropy_reference(*inputs, *options)
    oracle = op.linear_cross_entropy_reference(*wide, *options)
    for g, s, o in zip(got, want, oracle, strict=True):
        assert_as_accurate(g, s, o, ulps=8)
    grad = torch.randn(()).to(device) if reduce else torch.randn(shape[0], device=device)
    tail = (-100, None, True, True)
    got = guard.run(op.linear_cross_entropy_bwd_triton, grad, *inputs, want[1], *tail)
    want_grads = op.linear_cross_entropy_bwd_reference(grad, *inputs, want[1], *tail)
    oracle = op.linear_cross_entropy_bwd_reference(grad.double(), *wide, oracle[1], *tail)
    for g, s, o in zip(got, want_grads, oracle, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


def test_triton_over_chunks_of_the_vocabulary(device, guard, monkeypatch):
    """Several vocabulary chunks in backward, several tiles a program in forward."""
    monkeypatch.setattr(op, "GRADIENT_CHUNK", 1)
    inputs = _inputs((3, 16, 1100), torch.float32, device)
    config = {"EVEN_K": True, "BLOCK_M": 16, "BLOCK_N": 512, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(op, "_config", lambda n, d, dtype: config)
    want = op.linear_cross_entropy_reference(*inputs, -100, None, False, False)
    partial, target = torch.full((1, 3), float("nan")), torch.full((3,), float("nan"))
    op._fwd_kernel[(1, 1)](
        inputs[0], inputs[1], inputs[2], partial.to(device), target.to(device), 3, 1100, 16, 3, **config
    )
    kept = inputs[2] != -100
    if device == "cpu":
        torch.testing.assert_close(partial[0][kept], want[1][kept])
        torch.testing.assert_close((partial[0] - target)[kept], want[0][kept])
    grad = torch.randn(3, device=device)
    got = guard.run(op.linear_cross_entropy_bwd_triton, grad, *inputs, want[1], -100, None, True, True)
    expected = op.linear_cross_entropy_bwd_reference(grad, *inputs, want[1], -100, None, True, True)
    for g, w in zip(got, expected, strict=True):
        torch.testing.assert_close(g, w, atol=2e-6, rtol=1e-5)


def test_a_device_that_is_not_waited_for_answers_nan(device, monkeypatch):
    """A wrong label or a wrong count cannot raise without a sync: the loss is NaN."""
    hidden, weight, labels = _inputs((4, 16, 32), torch.float32, device, ignored=9)  # row 1 is ignored
    launch = op.linear_cross_entropy_triton

    if device == "cpu":  # the branch that a GPU takes
        monkeypatch.setattr(op, "_kept_rows", lambda labels, v, *rest: op._rows_without_sync(labels, *rest))
    assert launch(hidden, weight, labels, -100, 3, True, False)[0].isfinite()
    assert launch(hidden, weight, labels, -100, 2, True, False)[0].isnan()
    assert launch(hidden, weight, labels, -100, 4, True, False)[0].isnan()
    labels[2] = 32
    assert launch(hidden, weight, labels, -100, 3, True, False)[0].isnan()


def test_stride_0_gradient():
    """`.sum().backward()` hands the backward an expanded scalar."""
    hidden, weight, labels = _inputs((7, 24, 37), torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    total = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, reduction="sum"), [hidden, weight])
    rows = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, reduction="none").sum(), [hidden, weight])
    for a, b in zip(total, rows, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduce", [False, True])
def test_opcheck(reduce):
    hidden, weight, labels = _inputs((5, 8, 16), torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    torch.library.opcheck(
        torch.ops.fastmllm.linear_cross_entropy.default, (hidden, weight, labels, -100, None, reduce, False)
    )
    if reduce:
        arguments = (hidden, weight.detach(), labels, -100, 3, True, True)
        torch.library.opcheck(torch.ops.fastmllm.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("frozen", [False, True])
def test_compile(frozen):
    hidden, weight, labels = _inputs((5, 8, 16), torch.float32)

    def step(hidden, weight, labels, n):
        return linear_cross_entropy(hidden, weight, labels, num_targets=n)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (3, 2):  # the count changes from batch to batch
        labels[:] = -100
        labels[:n] = 1
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)]
        want = [step(*leaves, labels, n)]
        want += torch.autograd.grad(want[0], [t for t in leaves if t.requires_grad])
        got = [compiled(*leaves, labels, n)]
        got += torch.autograd.grad(got[0], [t for t in leaves if t.requires_grad])
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    hidden, weight, labels = _inputs((4, 3, 5), torch.float64)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: _ours(h, weight, labels, reduction), (hidden,))
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: _ours(h, w, labels, reduction), (hidden, weight))
    hidden.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda w: _ours(hidden, w, labels, reduction), (weight,))


def test_rejects_what_does_not_fit():
    hidden, weight, labels = _inputs((4, 8, 16), torch.float32)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: .*\(4, 8\), \(16, 9\), \(4,\)"):
        linear_cross_entropy(hidden, torch.zeros(16, 9), labels)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: .*\(3,\)"):
        linear_cross_entropy(hidden, weight, labels[:3])
    with pytest.raises(ValueError, match=r"float32 and weight torch\.bfloat16"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match="labels must be integers"):
        linear_cross_entropy(hidden, weight, labels.float())
    with pytest.raises(ValueError, match="reduction 'max'"):
        linear_cross_entropy(hidden, weight, labels, reduction="max")
    with pytest.raises(ValueError, match="num_targets is 4, but 3 of the labels"):
        linear_cross_entropy(hidden, weight, labels, num_targets=4)
    for bad in (16, -1):
        labels[0] = bad
        with pytest.raises(ValueError, match=rf"label {bad} is outside of the vocabulary \[0, 16\)"):
            linear_cross_entropy(hidden, weight, labels)
