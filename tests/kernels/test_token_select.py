"""token_select: equal to a sort of each segment, and to its Triton and C++ forms; ties, NaN, padding, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import strided
from torch.utils._python_dispatch import TorchDispatchMode

from fastmllm.kernels import token_select as op
from fastmllm.kernels.token_select import token_select

LENGTHS = [[7, 0, 3, 12], [33], [5, 5, 5], []]
BUDGETS = [4, 0, 100, "ragged", "cut"]  # the last two on the device; their total is enough, or not


def _inputs(lengths, dtype=torch.float32, device="cpu", behind=2, width=5):
    """Return tokens with `behind` more of them than the segments have, cu_seqlens, awkward scores, and planes."""
    generator = torch.Generator().manual_seed(3)
    n = sum(lengths) + behind
    x = torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)
    scores = torch.randint(-2, 3, (n,), generator=generator).float()  # many are equal
    awkward = torch.tensor([math.nan, -0.0, 0.0, math.inf, -math.inf, -math.nan])[: max(n, 0)]
    scores[: len(awkward)] = awkward
    cu = torch.tensor([0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32)
    planes = [torch.arange(n), torch.randn(n, 2, 3, generator=generator), torch.arange(n) % 3 == 0]
    return x.to(device), cu.to(device), scores.to(device), [p.to(device) for p in planes]


def _budget(kind, lengths, device="cpu"):
    """Return what to pass as budget and total."""
    if isinstance(kind, int):
        return kind, None
    ragged = [(5 * i + 3) % 9 - 1 for i in range(len(lengths))]  # a negative one is 0
    kept = sum(max(0, min(b, n)) for b, n in zip(ragged, lengths, strict=True))
    return torch.tensor(ragged, dtype=torch.int64, device=device), kept + 3 if kind == "ragged" else kept - 3


def _published(lengths, scores, budget, total):
    """Return the kept tokens and cu_seqlens by sorting each segment in Python."""
    budgets = [budget] * len(lengths) if isinstance(budget, int) else budget.tolist()
    rows, cu, first = [], [0], 0
    for length, k in zip(lengths, budgets, strict=True):
        local = scores[first : first + length].tolist()
        order = sorted(range(length), key=lambda i: (math.isnan(local[i]), -local[i] if local[i] == local[i] else 0, i))
        k = min(max(k, 0), length, total - len(rows))
        rows += sorted(first + i for i in order[:k])
        first += length
        cu.append(len(rows))
    return rows, cu


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matches_a_sort_of_each_segment(lengths, dtype, kind):
    x, cu, scores, planes = _inputs(lengths, dtype)
    budget, total = _budget(kind, lengths)
    x = strided(x).requires_grad_()
    got, index, new_cu, got_planes = token_select(
        x, cu, scores, budget, planes, None if total is None else max(total, 0)
    )
    rows, want_cu = _published(lengths, scores, budget, len(index))
    padding = len(index) - len(rows)
    assert new_cu.tolist() == want_cu
    assert index.tolist() == rows + [-1] * padding
    assert len(index) == (min(len(x), len(lengths) * budget) if isinstance(budget, int) else len(index))
    for y, source in zip([got, *got_planes], [x, *planes], strict=True):
        assert torch.equal(y, torch.cat([source[rows], source.new_zeros(padding, *source.shape[1:])]))
    if padding < len(index):
        seed = torch.randn_like(got)
        (dx,) = torch.autograd.grad(got, x, seed)
        assert torch.equal(
            dx, torch.zeros_like(x).index_copy_(0, torch.tensor(rows, dtype=torch.long), seed[: len(rows)])
        )


def test_gradients_reach_floating_planes_and_frozen_tokens_cost_nothing(monkeypatch):
    x, cu, scores, planes = _inputs([7, 5])
    scattered = []
    backward = op._token_select_bwd
    monkeypatch.setattr(op, "_token_select_bwd", lambda grads, *a: scattered.append(len(grads)) or backward(grads, *a))
    deep = torch.randn(len(x), 4).requires_grad_()
    rows, index, _, out = token_select(x, cu, scores, 3, [planes[0], deep])
    assert not index.requires_grad
    (rows.sum() + out[1].sum()).backward()  # stride-0 gradients
    assert scattered == [1]
    assert deep.grad.sum(1).tolist() == [4.0 if i in index.tolist() else 0.0 for i in range(len(x))]


def test_a_segment_does_not_depend_on_its_neighbours():
    x, cu, scores, _ = _inputs([7, 9, 12], behind=0)
    together = token_select(x, cu, scores, 4)[1]
    for s in range(3):
        part = slice(cu[s], cu[s + 1])
        alone = token_select(x[part], torch.tensor([0, part.stop - part.start], dtype=torch.int32), scores[part], 4)[1]
        assert torch.equal(alone + cu[s], together[4 * s : 4 * s + 4])
    assert torch.equal(token_select(x, cu, scores, 4)[1], together)


@pytest.mark.parametrize("kind", [4, 100, "ragged", "cut"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_matches_reference(dtype, kind, device, guard):
    lengths = [7, 0, 20]
    x, cu, scores, planes = _inputs(lengths, dtype, device)
    budget, total = _budget(kind, lengths, device)
    k, budget = (budget, None) if isinstance(budget, int) else (0, budget)
    xs = [guard(t) for t in (x, *planes[:2], planes[2].byte())]
    total = total or min(len(x), 3 * k)
    # max_seqlen sizes the launch only: 16 of 20 leaves a second round to the one program of a segment
    got = guard.run(op.token_select_triton, xs, cu, scores, budget, k, total, 16)
    want = op.token_select_reference(xs, cu, scores, budget, k, total, 20)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)


def test_triton_copies_any_dtype(device):
    _, cu, scores, planes = _inputs([9], device=device)
    xs = [planes[2], planes[0].double(), planes[1].half()]
    got = op.token_select_triton(xs, cu, scores, None, 4, 6, 9)
    for g, w in zip(got, op.token_select_reference(xs, cu, scores, None, 4, 6, 9), strict=True):
        assert torch.equal(g, w)


def test_triton_finds_the_threshold_across_blocks(device, guard):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(600, generator=generator)  # blocks of 256, three of them
    scores[100:500:7] = scores[100]
    scores = scores.to(device)
    cu = torch.tensor([0, 600], dtype=torch.int32, device=device)
    k = int((scores > scores[100]).sum()) + 9  # the threshold falls among the equal ones
    x = scores.view(-1, 1).clone()
    keys = op._config
    op._config = lambda *a: keys(256, 1) | {"BLOCK_T": 256}
    try:
        got = guard.run(op.token_select_triton, [guard(x)], cu, scores, None, k, k + 5, 256)
    finally:
        op._config = keys
    for g, w in zip(got, op.token_select_reference([x], cu, scores, None, k, k + 5, 600), strict=True):
        assert torch.equal(g, w)


def test_triton_backward_matches_reference(device, guard):
    x, cu, scores, _ = _inputs([7, 0, 12], torch.bfloat16, device)
    *_, index, place, _ = op.token_select_reference([x], cu, scores, None, 4, 12, 12)
    wide = torch.randn(12, 3, 100, device=device)
    for grads in ([wide, torch.randn(12, device=device).bfloat16()], [torch.ones((), device=device).expand(12, 5)]):
        given = [guard(g) for g in grads] if len(grads) == 2 else grads
        got = guard.run(op.token_select_bwd_triton, given, index, place)
        for g, w in zip(got, op.token_select_bwd_reference([g.contiguous() for g in grads], index, place), strict=True):
            assert torch.equal(g, w)


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("lengths", [*LENGTHS, [577, 1296, 40]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_matches_reference(lengths, dtype, kind):
    from fastmllm.kernels import _native

    if _native.EXTENSION_MISSING:
        pytest.skip(_native.EXTENSION_MISSING)
    x, cu, scores, planes = _inputs(lengths, dtype)
    budget, total = _budget(kind, lengths)
    total = min(len(x), len(lengths) * budget) if total is None else max(total, 0)
    k, budget = (budget, None) if isinstance(budget, int) else (0, budget)
    args = ([strided(x), *planes], cu.long(), strided(scores.view(-1, 1))[:, 0], budget, k, total, 20)
    for got, want in zip(torch.ops.fastmllm.token_select(*args), op.token_select_reference(*args), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_native_refuses_segments_outside_of_the_tokens():
    from fastmllm.kernels import _native

    if _native.EXTENSION_MISSING:
        pytest.skip(_native.EXTENSION_MISSING)
    with pytest.raises(RuntimeError, match="token_select: cu_seqlens"):
        token_select(torch.randn(4, 2), torch.tensor([0, 6]), torch.randn(4), 1)


def test_the_reference_does_not_wait_for_the_device():
    x, cu, scores, planes = _inputs([7, 5])
    budget = torch.tensor([2, 3])

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    with Reads():
        op.token_select_reference([x, *planes], cu, scores, budget, 0, 6, 7)


@pytest.mark.parametrize("segments", [2, 70000])
def test_two_launches_no_wait_and_any_number_of_segments(segments, monkeypatch):
    """Meta tensors cannot be read: a launcher that waits for the device fails here. Axes 1 and 2 end at 65535."""
    launches = []

    class Counted:
        def __getitem__(self, grid):
            return lambda *a, **k: launches.append(grid)

    monkeypatch.setattr(op, "_fwd_kernel", Counted())
    monkeypatch.setattr(op, "_bwd_kernel", Counted())
    n = 2 * segments

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    xs, cu = [empty(n, 5), empty(n, dtype=torch.int64), empty(n, 2, 3)], empty(segments + 1, dtype=torch.int32)
    budget = empty(segments, dtype=torch.int64)
    *ys, index, place, _ = op.token_select_triton(xs, cu, empty(n), budget, 0, n, 1 << 20)
    op.token_select_bwd_triton([ys[0], ys[2]], index, place)
    assert len(launches) == 2
    assert all(axis <= 65535 for grid in launches for axis in grid[1:])
    assert all(grid[0] < 1 << 31 for grid in launches)


def test_opcheck():
    x, cu, scores, planes = _inputs([7, 5])
    deep = planes[1].requires_grad_()
    args = ([x.requires_grad_(), planes[0], deep], cu, scores, None, 3, 6, 7)
    torch.library.opcheck(torch.ops.fastmllm.token_select.default, args)
    torch.library.opcheck(torch.ops.fastmllm.token_select.default, ([x], cu, scores, torch.tensor([2, 9]), 0, 9, 7))


def test_compile():
    x, cu, scores, planes = _inputs([7, 5])
    x.requires_grad_()

    def loss(x):
        rows, index, new_cu, out = token_select(x, cu, scores, 3, planes[:2])
        return (rows * out[1].sum((1, 2))[:, None]).sum(), index, new_cu

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(x), loss(x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    torch.testing.assert_close(torch.autograd.grad(got[0], x), torch.autograd.grad(want[0], x))


def test_compiles_once_for_any_number_of_tokens():
    compiled_graphs = []

    def backend(graph, _):
        compiled_graphs.append(graph)
        return graph.forward

    def kept(x, cu, scores):
        return token_select(x, cu, scores, x.shape[0] // 4)[:3]

    compiled = torch.compile(kept, fullgraph=True, dynamic=True, backend=backend)
    for n in range(20, 50, 3):
        x, cu, scores, _ = _inputs([10, n - 10], behind=0)
        for got, want in zip(compiled(x, cu, scores), kept(x, cu, scores), strict=True):
            assert torch.equal(got, want)
    assert len(compiled_graphs) <= 2


def test_gradcheck():
    x, cu, scores, _ = _inputs([4, 3], torch.float64, width=2)
    plane = torch.randn(len(x), dtype=torch.float64).requires_grad_()

    def rows(x, plane):
        out = token_select(x, cu, scores, 3, [plane], total=6)
        return out[0], out[3][0]

    assert torch.autograd.gradcheck(rows, (x.requires_grad_(), plane))


def test_rejects_what_does_not_fit():
    x, cu, scores, planes = _inputs([7, 5], behind=0)
    with pytest.raises(ValueError, match=r"token_select: tokens \(12, 5\) must be \(N, \.\.\.\) and scores \(11,\)"):
        token_select(x, cu, scores[1:], 3)
    with pytest.raises(ValueError, match=r"token_select: cu_seqlens \(3,\) torch\.float32"):
        token_select(x, cu.float(), scores, 3)
    with pytest.raises(ValueError, match=r"token_select: planes\[1\] \(11,\)"):
        token_select(x, cu, scores, 3, [planes[0], planes[0][1:]])
    with pytest.raises(ValueError, match=r"token_select: budget \(3,\)"):
        token_select(x, cu, scores, torch.tensor([1, 2, 3]), total=6)
    with pytest.raises(ValueError, match=r"token_select: budget \(2,\) is a tensor: say with total="):
        token_select(x, cu, scores, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"token_select: budget -1"):
        token_select(x, cu, scores, -1)
    with pytest.raises(ValueError, match=r"token_select: total -2"):
        token_select(x, cu, scores, 3, total=-2)
    with pytest.raises(ValueError, match=r"are on cpu, but \(12,\) torch\.float32 is on meta"):
        token_select(x, cu, scores.to("meta"), 3)
