"""token_merge: equal to a transcription of the algorithm, and to its Triton and C++ forms; gradients; order kept."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_accurate, strided

from fastmllm.kernels import token_merge as op
from fastmllm.kernels.token_merge import token_merge

CASES = [  # lengths and r of the segments, D, M, protected
    ([7, 7], [2, 2], 5, 3, 0),
    ([33, 4, 0, 1, 16], [8, 2, 0, 0, 7], 4, 40, 0),
    ([10, 7, 5], [4, 3, 1], 6, 3, 1),
    ([12, 9], [3, 2], 3, 5, 5),
    ([], [], 3, 3, 0),
]


def _inputs(case, dtype=torch.float32, device="cpu"):
    lengths, counts, width, metric_width, protected = case
    generator = torch.Generator().manual_seed(1)
    tokens = sum(lengths)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    # a metric that bf16 holds exactly: every implementation must find the same pairs
    metric = torch.randint(-8, 8, (tokens, metric_width), generator=generator).double()
    size = torch.randint(1, 5, (tokens,), generator=generator).double()
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    removed = [0, *torch.tensor(counts).cumsum(0).int().tolist()]
    tensors = x.to(device, dtype), metric.to(device, dtype), size.to(device, stats), cu
    return *tensors, removed, max(lengths, default=0), protected


def _published(x, metric, size, r, protected):
    """Transcribe Appendix D of the paper in fp64 loops for one image, then restore the order of the tokens."""
    x, metric, size, n = x.double(), metric.double(), size.double(), len(x)
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    scores = unit[::2] @ unit[1::2].T
    scores[: (protected + 1) // 2] = -torch.inf
    scores[:, : protected // 2] = -torch.inf
    best, node = scores.max(-1) if scores.numel() else (scores.sum(-1), None)
    merged = sorted(range(len(best)), key=lambda a: (-best[a].item(), a))[:r]
    total, weight = x * size[:, None], size.clone()
    for a in merged:
        b = 2 * int(node[a]) + 1
        total[b] += x[2 * a] * size[2 * a]
        weight[b] += size[2 * a]
    kept = [t for t in range(n) if not (t % 2 == 0 and t // 2 in merged)]
    return total[kept] / weight[kept, None], weight[kept]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matches_the_published_algorithm(case, dtype):
    x, metric, size, cu, _, _, protected = _inputs(case, dtype)
    lengths, counts = case[:2]
    x = strided(x).requires_grad_()
    got = token_merge(x, strided(metric), size, counts, cu_seqlens=cu, protected=protected)
    pieces = [t.detach().split(lengths) for t in (x, metric, size)]
    images = [_published(*piece, r, protected) for *piece, r in zip(*pieces, counts, strict=True)]
    images = images or [(x.detach().double(), size.double())]
    want, want_size = (torch.cat(parts) for parts in zip(*images, strict=True))
    assert_as_accurate(got.tokens, want.to(dtype), want)
    torch.testing.assert_close(got.size.double(), want_size)
    torch.testing.assert_close(got.log_size.double(), want_size.log(), atol=1e-6, rtol=1e-6)
    assert got.cu_seqlens.diff().tolist() == [n - r for n, r in zip(lengths, counts, strict=True)]
    wide = x.detach().double().requires_grad_()
    expected = token_merge(wide, metric.double(), size.double(), counts, cu_seqlens=cu, protected=protected).tokens
    seed = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(got.tokens, x, seed.to(dtype))
    (want_dx,) = torch.autograd.grad(expected, wide, seed)
    assert_as_accurate(dx, want_dx.to(dtype), want_dx, ulps=8)


def test_a_batch_is_a_pack_of_equal_lengths():
    x, metric, size, cu, *_ = _inputs(([6] * 3, [2] * 3, 4, 3, 0))
    packed = token_merge(x, metric, size, 2, cu_seqlens=cu, max_seqlen=6)
    batch = token_merge(x.view(3, 6, 4), metric.view(3, 6, 3), size.view(3, 6), 2)
    assert batch.tokens.shape == (3, 4, 4)
    assert batch.size.shape == batch.log_size.shape == (3, 4)
    assert batch.destination.shape == (3, 6)
    for one, other in zip(batch, packed, strict=True):
        assert torch.equal(one.flatten(0, one.dim() - other.dim()), other)
    ragged = token_merge(x.view(3, 6, 4), metric.view(3, 6, 3), None, [1, 2, 0])
    assert ragged.cu_seqlens.tolist() == [0, 5, 9, 15]
    assert ragged.tokens.shape == (15, 4)
    assert token_merge(x.view(3, 6, 4)[:0], metric.view(3, 6, 3)[:0], None, 2).tokens.shape == (0, 4, 4)


def test_the_destination_says_where_a_token_went():
    x, metric, size, cu, _, _, protected = _inputs(CASES[2], torch.float64)
    got = token_merge(x, metric, size, CASES[2][1], cu_seqlens=cu, protected=protected)
    torch.testing.assert_close(torch.zeros_like(got.size).index_add(0, got.destination, size), got.size)
    sums = torch.zeros_like(got.tokens).index_add(0, got.destination, x * size[:, None])
    torch.testing.assert_close(sums / got.size[:, None], got.tokens)
    starts = got.cu_seqlens[:-1].long()
    assert torch.equal(got.destination[cu[:-1].long()], starts)  # protected: alone, in the first place
    torch.testing.assert_close(got.tokens[starts], x[cu[:-1].long()])


@pytest.mark.parametrize("native", [False, True])
def test_a_segment_does_not_depend_on_its_neighbours(native):
    x, metric, size, cu, removed, _, protected = _inputs(CASES[1])
    run = torch.ops.fastmllm.token_merge if native else op.token_merge_reference
    whole = run(x, metric, size, cu, removed, 33, protected)
    for s, (n, r) in enumerate(zip(*CASES[1][:2], strict=True)):
        here = slice(int(cu[s]), int(cu[s + 1]))
        alone_cu = torch.tensor([0, n], dtype=torch.int32)
        alone = run(x[here], metric[here], size[here], alone_cu, [0, r], n, protected)
        row = int(cu[s]) - removed[s]
        for part, want in zip(whole[:3], alone[:3], strict=True):
            assert torch.equal(part[row : row + n - r], want)
        assert torch.equal(whole[3][here] - row, alone[3])
    for one, other in zip(whole, run(x, metric, size, cu, removed, 33, protected), strict=True):
        assert torch.equal(one, other)


def _count_launches(monkeypatch, *kernels):
    """Record launches instead of making them; axes 1 and 2 of a grid end at 65535."""
    launched = []
    for name in kernels:

        def get(_, grid, name=name):
            assert all(axis <= 65535 for axis in grid[1:])
            return lambda *args, **options: launched.append(name)

        monkeypatch.setattr(op, name, type("Kernel", (), {"__getitem__": get})())
    return launched


@pytest.mark.parametrize("case", [CASES[1], ([3] * 70000, [1] * 70000, 4, 3, 0)], ids=["few", "many segments"])
def test_four_launches_forward_one_backward_and_no_wait(case, monkeypatch):
    """Meta tensors cannot be read: a launcher that waits for the device fails here."""
    kernels = ["_match_kernel", "_choose_kernel", "_place_kernel", "_fwd_kernel", "_bwd_kernel"]
    launched = _count_launches(monkeypatch, *kernels)
    x, metric, size, cu, *rest = _inputs(case, device="meta")
    y, new_size, _, destination = op.token_merge_triton(x, metric, size, cu, *rest)
    op.token_merge_bwd_triton(y, size, new_size, destination)
    assert launched == kernels
    with pytest.raises(ValueError, match=r"token_merge: max_seqlen 2147483648 x \d+ segments"):
        op.token_merge_triton(x, metric, size, cu, rest[0], 1 << 31, 0)


def _plan_of(destination, cu, removed, partner):
    """Return the lists that the merge kernel reads, made from destinations in plain loops."""
    order, start, count = (torch.zeros_like(partner) for _ in range(3))
    for first, last in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        at = first
        for token in range(first, last):
            mine = [t for t in range(first, last, 2) if destination[t] == destination[token] and t != token]
            takes = (token - first) % 2 == 1
            start[token], count[token] = at - first, len(mine) if takes else 0
            if takes:
                order[at : at + len(mine)] = torch.tensor(mine, dtype=torch.int32) - first
                at += len(mine)
    odd = {int(destination[t]) for f, e in zip(cu.tolist(), cu.tolist()[1:], strict=False) for t in range(f + 1, e, 2)}
    for first, last in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        for token in range(first, last, 2):
            if int(destination[token]) in odd:
                count[token] = -1
    return destination, order, start, count


@pytest.mark.parametrize("case", CASES[:4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_plan_matches_reference(case, dtype, device, guard):
    _, metric, _, cu, removed, longest, protected = _inputs(case, dtype, device)
    best, partner = guard.run(op.match_triton, metric, cu, longest, protected)
    wants = []
    for s, (first, last) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
        want, index = op._match_reference(metric[first:last], protected)
        torch.testing.assert_close(best[first:last:2], want, atol=1e-5, rtol=1e-5)
        free = want > -torch.inf
        assert torch.equal(partner[first:last:2][free].long(), index[free])
        best[first:last:2] = want  # the same cosines: equal ones must stay equal
        plan = op._plan_reference(want, index, last - first, removed[s + 1] - removed[s])
        wants.append(plan + first - removed[s])
    table = torch.tensor(removed, dtype=torch.int32, device=device)
    destination, order, start, count = guard.run(op.plan_triton, best, partner, cu, table, longest, protected)
    assert torch.equal(destination, torch.cat(wants))
    _, want_order, want_start, want_count = _plan_of(destination, cu, removed, partner)
    assert torch.equal(count, want_count)
    for token in (count > 0).nonzero().flatten().tolist():
        first = int(cu[:-1][cu[:-1] <= token].max())
        got, want = (
            o[first + int(s[token]) :][: int(count[token])].tolist()
            for o, s in ((order, start), (want_order, want_start))
        )
        assert got == want


@pytest.mark.parametrize("case", [([7, 6], [2, 3], 5, 3, 0), ([9, 2, 1], [4, 0, 0], 6, 3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_merge_matches_reference(case, dtype, device, guard):
    x, metric, size, cu, removed, longest, protected = _inputs(case, dtype, device)
    want, want_size, want_log, destination = op.token_merge_reference(x, metric, size, cu, removed, longest, protected)
    plan = _plan_of(destination, cu, removed, torch.zeros(len(x), dtype=torch.int32, device=device))
    got = guard.run(
        lambda x, size, cu, *plan: op.merge_triton(x, size, cu, plan, longest, len(want)), x, size, cu, *plan
    )
    wide = op._merge_reference(x.double(), size.double(), destination, len(want))[0]
    assert_as_accurate(got[0], want, wide, ulps=8)
    torch.testing.assert_close(got[1], want_size)
    torch.testing.assert_close(got[2], want_log)
    grad = torch.randn(want.shape).to(device, dtype)
    got = guard.run(op.token_merge_bwd_triton, grad, size, want_size, destination)
    want = op.token_merge_bwd_reference(grad, size, want_size, destination)
    wide = op.token_merge_bwd_reference(grad.double(), size.double(), want_size.double(), destination)
    assert_as_accurate(got, want, wide, ulps=8)


def test_triton_whole(device, guard):
    x, metric, size, cu, removed, longest, protected = _inputs(([6, 5], [2, 1], 4, 3, 1), device=device)
    got = guard.run(op.token_merge_triton, x, metric, size, cu, removed, longest, protected)
    want = op.token_merge_reference(x, metric, size, cu, removed, longest, protected)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_matches_across_blocks(dtype, device, guard):
    _, metric, _, cu, _, longest, _ = _inputs(([201, 9], [1, 1], 1, 70, 0), dtype, device)  # two blocks of everything
    best, partner = guard.run(op.match_triton, metric, cu, longest, 0)
    for first, last in ((0, 201), (201, 210)):
        want, want_index = op._match_reference(metric[first:last], 0)
        torch.testing.assert_close(best[first:last:2], want, atol=1e-5, rtol=1e-5)
        index = partner[first:last:2].long()
        assert (index == want_index).float().mean() > 0.98  # sums in another order may swap equal pairs
        unit = torch.nn.functional.normalize(metric[first:last].float(), dim=-1)
        torch.testing.assert_close((unit[::2] * unit[index]).sum(-1), want, atol=1e-5, rtol=1e-5)


def test_triton_plan_across_blocks(device, guard):
    """More even tokens than a program ranks and than one trip compares; equal cosines everywhere."""
    n, r = 280, 100
    cu, table = (torch.tensor([0, v], dtype=torch.int32, device=device) for v in (n, r))
    best = (torch.arange(n, device=device) % 7).float()
    partner = (2 * (torch.arange(n, device=device) % 5) + 1).int()
    destination, order, _, count = guard.run(op.plan_triton, best, partner, cu, table, n, 0)
    assert torch.equal(destination, op._plan_reference(best[::2], partner[::2].long(), n, r))
    merged = [t for t in range(0, n, 2) if count[t] < 0]
    assert len(merged) == r
    assert order[:r].tolist() == sorted(merged, key=lambda t: (int(partner[t]), t))


@pytest.mark.parametrize("form", ["reference", "native", "triton"])
@pytest.mark.parametrize("protected", [0, 3])
@pytest.mark.parametrize("bad", [[6], [7], [6, 7, 9, 12], range(3, 13)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tokens_without_a_direction_merge_last(form, protected, bad, value, device):
    """A NaN among the even tokens is least similar to all, among the odd ones it is nobody's partner."""
    n, r = 13, 4
    metric = torch.randint(1, 9, (n, 5), generator=torch.Generator().manual_seed(2)).float()
    metric[list(bad)] = value
    unit = torch.nn.functional.normalize(metric, dim=-1).double()
    evens, odds = range(protected + protected % 2, n, 2), range(protected + (protected + 1) % 2, n, 2)
    known = {a: [(round((unit[a] @ unit[b]).nan_to_num(-2).item(), 6), -b) for b in odds] for a in evens}
    merged = sorted(evens, key=lambda a: (-max(known[a])[0], a))[:r]
    stays = [t for t in range(n) if t not in merged]
    want = [stays.index(-max(known[t])[1] if t in merged else t) for t in range(n)]
    run = {"reference": op.token_merge_reference, "triton": op.token_merge_triton}
    call = run.get(form, torch.ops.fastmllm.token_merge)
    device = "cpu" if form == "native" else device
    x, size, cu = torch.ones(n, 2), torch.ones(n), torch.tensor([0, n], dtype=torch.int32)
    tensors = (t.to(device) for t in (x, metric, size, cu))
    y, _, _, destination = call(*tensors, [0, r], n, protected)
    assert destination.tolist() == want
    assert torch.equal(y, torch.ones_like(y))  # every row is written


def test_fp64_goes_to_the_reference(device):
    inputs = _inputs(CASES[1], torch.float64, device)
    got, want = op.token_merge_triton(*inputs), op.token_merge_reference(*inputs)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    grad, size = torch.randn_like(got[0]), inputs[2]
    got, want = (
        f(grad, size, want[1], want[3]) for f in (op.token_merge_bwd_triton, op.token_merge_bwd_reference)
    )  # fmt: skip
    assert torch.equal(got, want)


def test_triton_backward_of_a_stride_0_gradient(device):
    inputs = _inputs(CASES[0], device=device)
    _, new_size, _, destination = op.token_merge_reference(*inputs)
    grad = torch.ones((), device=device).expand(10, 5)
    got = op.token_merge_bwd_triton(grad, inputs[2], new_size, destination)
    torch.testing.assert_close(got, op.token_merge_bwd_reference(grad.contiguous(), inputs[2], new_size, destination))


NATIVE = [*CASES, ([577, 577, 130], [16, 16, 65], 24, 64, 0), ([577, 200], [100, 60], 8, 64, 5)]


@pytest.mark.parametrize("case", NATIVE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_native_matches_reference(case, dtype):
    from fastmllm.kernels import _native

    if _native.EXTENSION_MISSING:
        pytest.skip(_native.EXTENSION_MISSING)
    x, metric, size, *rest = _inputs(case, dtype)
    x, metric = strided(x), strided(metric)
    got, new_size, log_size, destination = torch.ops.fastmllm.token_merge(x, metric, size, *rest)
    *_, want_destination = op.token_merge_reference(x, metric, size, *rest)
    # sums in another order may swap equal pairs
    assert not len(x) or (destination == want_destination).float().mean() > 0.99
    want, want_size, want_log = op._merge_reference(x, size, destination, len(got))
    wide = op._merge_reference(x.double(), size.double(), destination, len(got))[0]
    assert_as_accurate(got, want, wide, ulps=8)
    torch.testing.assert_close(new_size, want_size)
    torch.testing.assert_close(log_size, want_log)


def test_opcheck():
    x, *rest = _inputs(CASES[2])
    torch.library.opcheck(torch.ops.fastmllm.token_merge.default, (x.requires_grad_(), *rest))


@pytest.mark.parametrize("r", [2, [4, 3, 1]])
def test_compile(r):
    x, metric, size, cu, _, longest, _ = _inputs(CASES[2])
    compiled = torch.compile(token_merge, fullgraph=True, backend="aot_eager")
    options = {"cu_seqlens": cu, "max_seqlen": longest}
    for got, want in zip(
        compiled(x, metric, size, r, **options), token_merge(x, metric, size, r, **options), strict=True
    ):
        torch.testing.assert_close(got, want)
    batch = x[:20].view(2, 10, 6), metric[:20].view(2, 10, 3), None, 2
    for got, want in zip(compiled(*batch), token_merge(*batch), strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck():
    x, metric, size, cu, *_ = _inputs(CASES[2], torch.float64)
    merge = lambda t: token_merge(t, metric, size, [4, 3, 1], cu_seqlens=cu).tokens  # noqa: E731
    assert torch.autograd.gradcheck(merge, x.requires_grad_())


def test_nothing_to_merge_changes_nothing():
    x = torch.randn(1, 5, 3)
    got = token_merge(x, x, None, 0)
    assert torch.equal(got.tokens, x)
    assert got.size.tolist() == [[1.0] * 5]
    assert got.log_size.tolist() == [[0.0] * 5]


def test_rejects_what_does_not_fit():
    x, cu = torch.randn(1, 5, 3), torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"token_merge: x \(1, 5, 3\), metric \(1, 4, 3\)"):
        token_merge(x, x[:, :4], None, 1)
    with pytest.raises(ValueError, match=r"token_merge: size \(1, 4\)"):
        token_merge(x, x, torch.ones(1, 4), 1)
    with pytest.raises(ValueError, match=r"token_merge: r 3 must lie in 0\.\.2 for 5 tokens"):
        token_merge(x, x, None, 3)
    with pytest.raises(ValueError, match=r"token_merge: r 2 must lie in 0\.\.1 for 5 tokens, 2 of them protected"):
        token_merge(x, x, None, 2, protected=2)
    with pytest.raises(ValueError, match=r"token_merge: r 2 must lie in 0\.\.1 for 2 tokens"):
        token_merge(x[0], x[0], None, 2, cu_seqlens=cu)
    with pytest.raises(ValueError, match=r"token_merge: r has 3 numbers for 2 images"):
        token_merge(x[0], x[0], None, [1, 1, 1], cu_seqlens=cu)
    with pytest.raises(ValueError, match=r"token_merge: cu_seqlens \(3,\) torch.int64"):
        token_merge(x[0], x[0], None, 1, cu_seqlens=cu.long())
    with pytest.raises(ValueError, match=r"token_merge: cu_seqlens \[0, 2, 5\] must rise from 0 to the 4 tokens"):
        token_merge(x[0, :4], x[0, :4], None, 1, cu_seqlens=cu)
