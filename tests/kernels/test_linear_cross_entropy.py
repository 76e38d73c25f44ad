"""linear_cross_entropy: equals torch, skips ignored rows, Triton equals the operator, autograd and dispatcher hold."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided
from torch.utils._python_dispatch import TorchDispatchMode

from fastmllm.bench.meters import peak_bytes
from fastmllm.kernels import linear_cross_entropy as op
from fastmllm.kernels.linear_cross_entropy import linear_cross_entropy, sequence_log_probs

SHAPES = [(7, 24, 37), (1, 16, 64), (0, 8, 16)]  # T, D, V


def _inputs(shape, dtype, device="cpu", ignored=3):
    torch.manual_seed(0)
    t, d, v = shape
    hidden, weight = torch.randn(t, d, dtype=torch.float64), torch.randn(v, d, dtype=torch.float64) / d**0.5
    labels = torch.randint(0, v, (t,))
    labels[1::ignored] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def _logits(hidden, weight):
    logits = F.linear(hidden, weight)
    return logits.double() if logits.dtype == torch.float64 else logits.float()


def _torch(hidden, weight, labels, reduction):
    """F.cross_entropy in fp32 on logits of the input dtype; the empty mean is 0."""
    logits = _logits(hidden, weight)
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
    monkeypatch.setattr(op, "_config", lambda d, dtype: {"EVEN_K": d % 16 == 0, **small})
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
    monkeypatch.setattr(op, "_config", lambda d, dtype: config)
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


@pytest.mark.parametrize("form", ["reference", "triton"])
@pytest.mark.parametrize("wrong", ["label", "count", "none counted"])
def test_what_makes_the_loss_nan_makes_the_gradients_nan(form, wrong, device, monkeypatch):
    """A step that does not look at the loss must not train on finite gradients of wrong labels."""
    if device == "cpu":  # the branch that a GPU takes
        monkeypatch.setattr(op, "_kept_rows", lambda labels, v, *rest: op._rows_without_sync(labels, *rest))
    hidden, weight, labels = _inputs((4, 16, 32), torch.float32, device, ignored=9)  # row 1 is ignored
    if wrong == "label":
        labels[2] = 32
    n = {"label": 3, "count": 2, "none counted": 0}[wrong]
    forward, backward = (getattr(op, f"linear_cross_entropy{direction}_{form}") for direction in ("", "_bwd"))
    loss, lse, early = forward(hidden, weight, labels, -100, n, True, True)
    d_hidden, d_weight = backward(torch.ones((), device=device), hidden, weight, labels, lse, -100, n, True, True)
    assert loss.isnan()
    assert d_weight.isnan().all()
    for rows in (early, d_hidden):
        assert rows[{"label": 2, "count": 0, "none counted": slice(None)}[wrong]].isnan().all()
        assert wrong != "label" or rows[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("masked", [64, 128])
def test_triton_takes_a_masked_vocabulary(masked, device, guard, monkeypatch):
    """Rows of -inf in the head: the first tile of a part of the vocabulary, and a whole part."""
    weight = torch.rand(130, 16, generator=torch.Generator().manual_seed(0)) / 4
    weight[:masked] = float("-inf")
    inputs = torch.ones(2, 16, device=device), weight.to(device), torch.tensor([129, 128], device=device)
    want = op.linear_cross_entropy_reference(*inputs, -100, None, False, False)[:2]
    assert want[0].isfinite().all()
    for splits in (1, 3):
        monkeypatch.setattr(op, "SPLITS", splits)
        got = guard.run(op.linear_cross_entropy_triton, *inputs, -100, None, False, False)[:2]
        torch.testing.assert_close(got, want)


def test_triton_gives_a_row_the_same_bits_among_any_rows(device, monkeypatch):
    monkeypatch.setattr(op, "SPLITS", 2)
    hidden, weight, labels = _inputs((34, 16, 180), torch.float32, device, ignored=40)  # two blocks of rows
    together = op.linear_cross_entropy_triton(hidden, weight, labels, -100, None, False, False)
    for here in (slice(33, 34), slice(2, 34)):  # one block
        alone = op.linear_cross_entropy_triton(hidden[here], weight, labels[here], -100, None, False, False)
        for a, t in zip(alone[:2], together[:2], strict=True):
            assert torch.equal(a, t[here])


# Weights, divisors, sequences -----------------------------------------------------------------------------------------
def _weighted(hidden, weight, labels, weights, reduction):
    losses = F.cross_entropy(_logits(hidden, weight), labels, reduction="none") * weights
    if reduction == "none":
        return losses
    kept = weights[labels >= 0]
    return losses.sum() / (kept.sum() if reduction == "mean" and kept.numel() else 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_match_torch(shape, dtype, reduction, frozen):
    hidden, weight, labels = _inputs(shape, dtype)
    weights = torch.rand(shape[0]) + 0.1
    seed = torch.randn(labels.shape if reduction == "none" else ())

    def run(function, *tensors):
        leaves = [t.detach().requires_grad_(not (frozen and i == 1)) for i, t in enumerate(tensors)]
        out = function(*leaves)
        wanted = [t for t in leaves if t.requires_grad]
        return [out.detach(), *(g for g in gradients([out], wanted, [seed]) if g is not None)]

    poisoned = torch.where(labels >= 0, weights, float("nan"))  # never read
    got = run(
        lambda h, w, x: linear_cross_entropy(h, w, labels, reduction=reduction, weights=x), hidden, weight, poisoned
    )
    same = run(lambda h, w, x: _weighted(h, w, labels, x, reduction), hidden, weight, weights)
    wide = run(
        lambda h, w, x: _weighted(h, w, labels, x, reduction), hidden.double(), weight.double(), weights.double()
    )
    for g, s, o in zip(got, same, wide, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_token_counts_alike_in_micro_batches_and_ranks(as_tensor, weighted):
    """Unequal shares of a batch: the sum of their losses, or the mean of ranks' gradients, is the whole batch's."""
    hidden, weight, labels = _inputs((12, 8, 16), torch.float64)
    weights = torch.rand(12, dtype=torch.float64) if weighted else None
    weight.requires_grad_()

    def loss(part, divisor):
        w = None if weights is None else weights[part]
        divisor = torch.as_tensor(divisor) if as_tensor and divisor is not None else divisor
        return linear_cross_entropy(hidden[part], weight, labels[part], weights=w, divisor=divisor)

    whole = loss(slice(None), None)
    (want,) = torch.autograd.grad(whole, weight)
    total = float((labels >= 0).sum() if weights is None else weights[labels >= 0].sum())
    parts = [slice(0, 1), slice(1, 9), slice(9, 12), slice(1, 2)]  # the last has no target
    torch.testing.assert_close(sum(loss(p, total) for p in parts), whole)
    ranks = [torch.autograd.grad(loss(p, total / len(parts)), weight)[0] for p in parts]
    torch.testing.assert_close(torch.stack(ranks).mean(0), want)
    assert loss(parts[-1], 0) == 0
    for negative in (torch.tensor(-1), torch.tensor([-0.5])):
        bad = loss(parts[1], negative)
        assert bad.isnan()
        assert torch.autograd.grad(bad, weight)[0].isnan().all()


def _sequence_torch(hidden, weight, labels, bounds, average):
    logp = -F.cross_entropy(_logits(hidden, weight), labels, reduction="none")
    sums = torch.stack([logp[a:b].sum() for a, b in pairwise(bounds)])
    counts = torch.stack([(labels[a:b] >= 0).sum() for a, b in pairwise(bounds)])
    return sums / counts.clamp(min=1) if average else sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_sequence_log_probs_match_torch(dtype, average, frozen):
    hidden, weight, labels = _inputs((13, 24, 37), dtype)
    labels[5:7] = -100
    bounds = [0, 4, 4, 5, 7, 13]  # one empty, one without targets
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    seed = torch.randn(5)

    def ours(h, w, labels, _):
        return sequence_log_probs(h, w, labels, cu_seqlens, average=average)

    def reference(h, w, labels, _):
        return _sequence_torch(h, w, labels, bounds, average)

    got = _loss_and_gradients(ours, strided(hidden), strided(weight), labels, None, seed, frozen)
    same = _loss_and_gradients(reference, hidden, weight, labels, None, seed, frozen)
    wide = _loss_and_gradients(reference, hidden.double(), weight.double(), labels, None, seed, frozen)
    assert got[0].dtype == torch.float32
    for g, s, o in zip(got, same, wide, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


def test_a_sequence_does_not_depend_on_its_neighbours():
    hidden, weight, labels = _inputs((13, 24, 37), torch.float32)
    bounds = [0, 4, 4, 5, 7, 13]
    got = sequence_log_probs(hidden, weight, labels, torch.tensor(bounds))
    poisoned = hidden.clone()
    poisoned[:7] = float("nan")
    last = sequence_log_probs(poisoned, weight, labels, torch.tensor(bounds))[-1]
    torch.testing.assert_close(last, got[-1], rtol=0, atol=0)
    for s, (a, b) in enumerate(pairwise(bounds)):
        alone = sequence_log_probs(hidden[a:b], weight, labels[a:b], torch.tensor([0, b - a]))
        torch.testing.assert_close(alone[0], got[s], rtol=2e-7, atol=0)  # torch's own products depend on the batch
    assert torch.equal(got, sequence_log_probs(hidden, weight, labels, torch.tensor(bounds)))


def test_sequence_log_probs_gradcheck_and_compile():
    hidden, weight, labels = _inputs((6, 3, 5), torch.float64)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: sequence_log_probs(h, w, labels, cu_seqlens, average=True), leaves)

    def dpo(h, w):
        chosen, rejected = sequence_log_probs(h, w, labels, cu_seqlens)
        return -F.logsigmoid(0.1 * (chosen - rejected))

    compiled = torch.compile(dpo, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), dpo(*leaves)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(g, w)


# What it costs --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("frozen", [False, True])
def test_the_full_logits_are_never_held(frozen, monkeypatch):
    kept, vocabulary = 64, 4096
    hidden, weight, labels = _inputs((kept, 8, vocabulary), torch.float32, ignored=kept)
    monkeypatch.setattr(op, "CHUNK", 4 * vocabulary)
    full = kept * vocabulary * 4
    leaves = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    assert peak_bytes(lambda: linear_cross_entropy(*leaves, labels, reduction="sum").backward()) < full / 2
    bounds = torch.tensor([0, 10, kept])
    assert peak_bytes(lambda: sequence_log_probs(*leaves, labels, bounds).sum().backward()) < full / 2


def test_the_launchers_wait_for_nothing_and_work_in_proportion_to_kept_rows(device, monkeypatch):
    """With num_targets: no read-back, as many operators for any batch, programs by kept rows, never the full logits."""
    programs = 0

    class Kernel:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                nonlocal programs
                programs += math.prod(grid)

            return launch

    for name in ("_fwd_kernel", "_join_kernel", "_bwd_kernel"):
        monkeypatch.setattr(op, name, Kernel())
    monkeypatch.setattr(op, "GRADIENT_CHUNK", 1)  # 1024 columns at a time
    if device == "cpu":  # the branch that a GPU takes
        monkeypatch.setattr(op, "_kept_rows", lambda labels, v, *rest: op._rows_without_sync(labels, *rest))
    hidden, weight, labels = _inputs((512, 16, 8192), torch.float32, device)
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::masked_select", "aten::_unique2"}
    work = []
    for kept in (128, 256):
        labels[:] = -100
        labels[:kept] = 1
        programs = 0

        def step(kept=kept):
            _, lse, _ = op.linear_cross_entropy_triton(hidden, weight, labels, -100, kept, True, False)
            grad = torch.ones((), device=device)
            op.linear_cross_entropy_bwd_triton(grad, hidden, weight, labels, lse, -100, kept, True, True)

        assert peak_bytes(step) < kept * 8192 * 4 / 2
        with _Names() as seen:
            step()
        assert not waits & set(seen.names)
        work.append((programs, len(seen.names)))
    assert work[1] == (2 * work[0][0], work[0][1])
    assert work[0][1] <= 40 + 7 * 8  # eight parts of the vocabulary


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_fp64_goes_to_the_reference(monkeypatch):
    """The kernels accumulate in fp32; not waited for, wrong labels are NaN here too."""
    hidden, weight, labels = _inputs((4, 16, 32), torch.float64, ignored=9)
    options = (-100, 3, True, False)
    got = op.linear_cross_entropy_triton(hidden, weight, labels, *options)
    want = op.linear_cross_entropy_reference(hidden, weight, labels, *options)
    torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=0)
    tail = (torch.ones((), dtype=torch.float64), hidden, weight, labels, want[1], -100, 3, True, True)
    got, want = op.linear_cross_entropy_bwd_triton(*tail), op.linear_cross_entropy_bwd_reference(*tail)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    monkeypatch.setattr(op, "_kept_rows", lambda labels, v, *rest: op._rows_without_sync(labels, *rest))
    labels[2] = 32
    assert op.linear_cross_entropy_triton(hidden, weight, labels, *options)[0].isnan()


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
    for bad in (torch.ones(3), torch.ones(4, dtype=torch.int64), torch.ones(4, device="meta")):
        with pytest.raises(ValueError, match=r"linear_cross_entropy: weights .*labels \(4,\)"):
            linear_cross_entropy(hidden, weight, labels, weights=bad)
    for bad in (-1, torch.ones(2)):
        with pytest.raises(ValueError, match=r"divisor .* must be one number >= 0"):
            linear_cross_entropy(hidden, weight, labels, divisor=bad)
    with pytest.raises(ValueError, match="reduction 'mean', not 'sum'"):
        linear_cross_entropy(hidden, weight, labels, reduction="sum", divisor=3)
    for bad in (torch.ones(2), torch.ones(1, 2, dtype=torch.int32), torch.empty(0, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"cu_seqlens .* must be \(S \+ 1,\) integers"):
            sequence_log_probs(hidden, weight, labels, bad)
    with pytest.raises(ValueError, match="cu_seqlens is on meta"):
        sequence_log_probs(hidden, weight, labels, torch.zeros(2, dtype=torch.int32, device="meta"))
    for bad in (16, -1):
        labels[0] = bad
        with pytest.raises(ValueError, match=rf"label {bad} is outside of the vocabulary \[0, 16\)"):
            linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_few_rows_are_kept_and_more_are_computed_again(reduction, monkeypatch):
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    labels = torch.randint(0, 20, (12,)).masked_fill(torch.arange(12) % 3 == 0, -100)
    found = []
    for chunk in (20 * 8, 20 * 7, 20):  # the 8 rows at once, in two parts, one by one
        monkeypatch.setattr(op, "CHUNK", chunk)
        kept = op._linear_cross_entropy(hidden, weight, labels, -100, None, True, False, True)[2]
        assert kept.shape == (8 if chunk == 160 else 0, 20)
        loss = op.linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
        found.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction=reduction).sum()
    found.append([expected, *torch.autograd.grad(expected, [hidden, weight])])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)
