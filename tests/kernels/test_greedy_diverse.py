"""greedy_diverse: equal to the formulas written as loops, and to its Triton and C++ forms; ties, NaN, padding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracle import strided

from fastmllm.kernels import greedy_diverse as op
from fastmllm.kernels.greedy_diverse import METHODS, greedy_diverse

LENGTHS = [[7, 0, 3, 12], [1, 30], []]
RELEVANCE = [("max_min", False), *itertools.product(METHODS[1:], (False, True))]


def _inputs(lengths, dtype=torch.float32, device="cpu", width=11, seed=5):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)
    relevance = 0.1 + torch.rand(n, generator=generator)
    cu = torch.tensor([0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32)
    return x.to(device), cu.to(device), relevance.to(device)


def _published(x, relevance, k, method):
    """Evaluate the formulas in fp64 for every candidate of every step, without recursions."""
    x = x.double()
    unit = x / x.norm(dim=-1, keepdim=True)
    cosine = unit @ unit.T
    r = relevance.double()
    picked: list[int] = []
    for _ in range(min(k, len(x))):
        scores = []
        for j in range(len(x)):
            if j in picked:
                scores.append(-math.inf)
            elif method == "max_min":
                others = picked or [i for i in range(len(x)) if i != j]
                scores.append(min([1 - cosine[i, j].item() for i in others], default=0.0))
            elif method == "dpp":
                both = [*picked, j]
                kernel = r[:, None] * cosine * r[None]
                scores.append((torch.det(kernel[both][:, both]) / torch.det(kernel[picked][:, picked])).item())
            elif method == "coverage":
                cover = cosine[picked].max(0).values.clamp(min=0) if picked else torch.zeros(len(x))
                scores.append((r[j] * (cosine[j] - cover).clamp(min=0).sum()).item())
            else:
                basis = torch.linalg.qr(x[picked].T).Q if picked else x.new_zeros(x.shape[1], 0)
                scores.append((r[j] * (x[j] - basis @ (basis.T @ x[j])).square().sum()).item())
        picked.append(max(range(len(x)), key=lambda j: (round(scores[j], 9), -j)))
    return picked


@pytest.mark.parametrize(("method", "weighted"), RELEVANCE)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["reference", "native"])
def test_matches_the_formulas(lengths, dtype, method, weighted, form):
    x, cu, relevance = _inputs(lengths, dtype)
    ones = torch.ones_like(relevance)
    weight = relevance if weighted else None
    args = (strided(x), cu, weight, None, 6, min(len(x), 6 * len(lengths)), len(x), method, False)
    index, new_cu = (
        op.greedy_diverse_reference(*args) if form == "reference" else torch.ops.fastmllm.greedy_diverse(*args)
    )
    bounds = cu.tolist()
    want, want_cu = [], [0]
    for first, last in itertools.pairwise(bounds):
        picked = _published(x[first:last], (relevance if weighted else ones)[first:last], 6, method)
        want += [first + j for j in picked]
        want_cu.append(len(want))
    assert new_cu.tolist() == want_cu
    if method == "coverage":  # of two tokens that cover each other, either is right up to rounding: judge the sets
        for first, last, start, end in zip(bounds, bounds[1:], want_cu, want_cu[1:], strict=False):
            value = [_covered(x[first:last], torch.tensor(w[start:end]) - first) for w in (want, index.tolist())]
            assert end == start or weighted or value[1] >= value[0] * (1 - 1e-4)
        assert index.tolist()[:1] == want[:1]
    else:
        assert index.tolist() == want + [-1] * (len(index) - len(want))


def _covered(x, picked):
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return (unit @ unit[picked].T).max(1).values.clamp(min=0).sum().item() if len(picked) else 0.0


@pytest.mark.parametrize("method", METHODS)
def test_order_padding_and_budgets_on_the_device(method):
    x, cu, _ = _inputs([7, 0, 3, 12])
    budget = torch.tensor([3, 5, 9, -1])
    index, new_cu = greedy_diverse(x, cu, budget, method, total=9)
    assert new_cu.tolist() == [0, 3, 3, 6, 6]
    assert index[6:].tolist() == [-1] * 3
    assert index[3:6].tolist() == [7, 8, 9]  # a segment that is not longer than its budget
    greedy, _ = greedy_diverse(x, cu, budget, method, in_order=False, total=9)
    assert torch.equal(greedy[:3].sort().values, index[:3])
    fewer, _ = greedy_diverse(x, cu, 2, method, in_order=False)
    assert torch.equal(fewer[:2], greedy[:2])
    cut, cut_cu = greedy_diverse(x, cu, budget, method, in_order=False, total=5)
    assert cut_cu.tolist() == [0, 3, 3, 5, 5]
    assert torch.equal(cut[:3], greedy[:3])


@pytest.mark.parametrize("method", METHODS)
def test_a_segment_does_not_depend_on_its_neighbours(method):
    x, cu, relevance = _inputs([7, 9, 12])
    weight = None if method == "max_min" else relevance
    together, _ = greedy_diverse(x, cu, 4, method, weight)
    assert torch.equal(greedy_diverse(x, cu, 4, method, weight)[0], together)
    for s in range(3):
        part = slice(cu[s], cu[s + 1])
        alone = torch.tensor([0, part.stop - part.start], dtype=torch.int32)
        index, _ = greedy_diverse(x[part], alone, 4, method, None if weight is None else weight[part])
        assert torch.equal(index + cu[s], together[4 * s : 4 * s + 4])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["reference", "native", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_come_late_and_nan_comes_last(method, form, bad, dtype, device):
    x, _, _ = _inputs([5], width=16)
    x = torch.cat([x, x[:2], torch.full((1, 16), bad), x[2:]]).to(device, dtype)  # 5 tokens, their 5 copies, NaN
    x[7, 1:] = 1
    cu = torch.tensor([0, 11], dtype=torch.int32, device=device)
    run = {"reference": op.greedy_diverse_reference, "triton": op.greedy_diverse_triton}
    call = run.get(form, torch.ops.fastmllm.greedy_diverse)
    index, _ = call(x, cu, None, None, 11, 11, 11, method, False)
    copy_of = torch.tensor([0, 1, 2, 3, 4, 0, 1, -1, 2, 3, 4])
    assert sorted(copy_of[index[:5].cpu()].tolist()) == [0, 1, 2, 3, 4]
    assert index[-1] == 7
    late = index[5:10].tolist()
    assert late == sorted(late)  # all worth 0: the lowest first


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("held", [True, False], ids=["held", "rows on demand"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_matches_reference(method, held, dtype, device, guard, monkeypatch):
    monkeypatch.setattr(op, "MOST_PAIRS", op.MOST_PAIRS if held else 0)
    few = method == "coverage" and not held  # a row for every token that is covered better
    x, cu, relevance = _inputs([5, 4] if few else [9, 0, 21], dtype, device, width=18)
    weight = None if method == "max_min" else relevance
    budget = torch.tensor([2, 1] if few else [2, 3, 4], device=device)
    args = (x, cu, weight, budget, 0, 4 if few else 8, 21, method, dtype == torch.float32)  # in order, or as picked
    for g, w in zip(guard.run(op.greedy_diverse_triton, *args), op.greedy_diverse_reference(*args), strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)


@pytest.mark.parametrize("method", METHODS)
def test_triton_matches_across_blocks(method, device, guard, monkeypatch):
    x, cu, relevance = _inputs([70], device=device, width=6)  # three tiles of pairs, two blocks of tokens
    tiles = op._config(method, 70, 6, torch.float32, True)
    monkeypatch.setattr(
        op, "_config", lambda *a: ({**tiles[0], "BLOCK": 64}, {**tiles[1], "BLOCK_N": 64, "BLOCK_C": 32})
    )
    args = (x, cu, None if method == "max_min" else relevance, None, 2, 2, 70, method, True)
    assert torch.equal(guard.run(op.greedy_diverse_triton, *args)[0], op.greedy_diverse_reference(*args)[0])


@pytest.mark.parametrize(("method", "weighted"), RELEVANCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_native_matches_reference(method, weighted, dtype):
    from fastmllm.kernels import _native

    if _native.EXTENSION_MISSING:
        pytest.skip(_native.EXTENSION_MISSING)
    x, cu, relevance = _inputs([130, 0, 3, 77], dtype, width=130)
    for budget in (None, torch.tensor([20, 1, 9, 30], dtype=torch.int32)):
        args = (strided(x), cu.long(), relevance if weighted else None, budget, 9, 45, 130, method, False)
        got, want = torch.ops.fastmllm.greedy_diverse(*args), op.greedy_diverse_reference(*args)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)


@pytest.mark.parametrize("method", ["max_min", "coverage"])
def test_native_computes_rows_on_demand_for_long_segments(method):
    from fastmllm.kernels import _native

    if _native.EXTENSION_MISSING:
        pytest.skip(_native.EXTENSION_MISSING)
    x, cu, _ = _inputs([4100], width=8)
    args = (x, cu, None, None, 2, 2, 4100, method, False)
    assert torch.equal(torch.ops.fastmllm.greedy_diverse(*args)[0], op.greedy_diverse_reference(*args)[0])


def test_native_refuses_segments_outside_of_the_tokens():
    from fastmllm.kernels import _native

    if _native.EXTENSION_MISSING:
        pytest.skip(_native.EXTENSION_MISSING)
    with pytest.raises(RuntimeError, match="greedy_diverse: cu_seqlens"):
        greedy_diverse(torch.randn(4, 2), torch.tensor([0, 6]), 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("segments", [4, 70000])
def test_two_launches_whatever_the_segments_and_the_budget(segments, method, monkeypatch):
    """Meta tensors have no data: whatever would wait for it fails. Axes 1 and 2 of a grid end at 65535."""
    launches = []

    class Counted:
        def __getitem__(self, grid):
            return lambda *a, **k: launches.append(grid)

    monkeypatch.setattr(op, "_pairs_kernel", Counted())
    monkeypatch.setattr(op, "_greedy_kernel", Counted())
    tokens = torch.empty(10 * segments, 4, device="meta")
    cu = torch.empty(segments + 1, dtype=torch.int32, device="meta")
    budget = torch.empty(segments, dtype=torch.int32, device="meta")
    op.greedy_diverse_triton(tokens, cu, None, budget, 0, 9, 200, method, True)
    assert len(launches) == 2
    assert all(axis <= 65535 for grid in launches for axis in grid[1:])


def test_fp64_goes_to_the_reference(device):
    x, cu, _ = _inputs([7, 5], torch.float64, device)
    args = (x, cu, None, None, 3, 6, 7, "dpp", True)
    assert torch.equal(op.greedy_diverse_triton(*args)[0], op.greedy_diverse_reference(*args)[0])


def test_gradients_flow_through_the_gather():
    x, cu, _ = _inputs([7, 5])
    x.requires_grad_()
    index, _ = greedy_diverse(x, cu, 3)
    assert not index.requires_grad
    x[index].sum().backward()
    assert x.grad.sum(1).tolist() == [11.0 if i in index.tolist() else 0.0 for i in range(12)]


def test_opcheck():
    x, cu, relevance = _inputs([7, 5])
    for method, weight in (("max_min", None), ("coverage", relevance)):
        torch.library.opcheck(
            torch.ops.fastmllm.greedy_diverse.default, (x, cu, weight, None, 3, 6, 7, method, True),
        )  # fmt: skip


def test_compile():
    x, cu, relevance = _inputs([7, 5])
    compiled = torch.compile(greedy_diverse, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, cu, 3, "dpp", relevance), greedy_diverse(x, cu, 3, "dpp", relevance), strict=True):
        assert torch.equal(got, want)


def test_compiles_once_for_any_number_of_tokens():
    compiled_graphs = []

    def backend(graph, _):
        compiled_graphs.append(graph)
        return graph.forward

    def picked(x, cu, relevance):
        return greedy_diverse(x, cu, x.shape[0] // 4, "dpp", relevance)

    compiled = torch.compile(picked, fullgraph=True, dynamic=True, backend=backend)
    for n in range(20, 50, 3):
        inputs = _inputs([10, n - 10])
        for got, want in zip(compiled(*inputs), picked(*inputs), strict=True):
            assert torch.equal(got, want)
    assert len(compiled_graphs) <= 2


def test_rejects_what_does_not_fit():
    x, cu, relevance = _inputs([7, 5])
    with pytest.raises(ValueError, match="greedy_diverse: method 'mmr' must be one of max_min, dpp"):
        greedy_diverse(x, cu, 3, "mmr")
    with pytest.raises(ValueError, match=r"greedy_diverse: tokens \(12,\) torch\.float32 must be float \(N, D\)"):
        greedy_diverse(relevance, cu, 3)
    with pytest.raises(ValueError, match=r"greedy_diverse: max_min takes no relevance \(12,\)"):
        greedy_diverse(x, cu, 3, relevance=relevance)
    with pytest.raises(ValueError, match=r"greedy_diverse: relevance \(11,\) torch\.float32"):
        greedy_diverse(x, cu, 3, "dpp", relevance[1:])
    with pytest.raises(ValueError, match=r"greedy_diverse: cu_seqlens \(1, 3\)"):
        greedy_diverse(x, cu[None], 3)
    with pytest.raises(ValueError, match=r"greedy_diverse: budget \(2,\) is a tensor"):
        greedy_diverse(x, cu, cu[1:])
