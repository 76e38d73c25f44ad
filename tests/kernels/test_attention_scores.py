"""attention_scores: equal to eager attention with its weights; Triton equals the operator."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_as_accurate, strided

from fastmllm.kernels import attention_scores as op
from fastmllm.kernels.attention import attention
from fastmllm.kernels.attention_scores import attention_scores

# (query lengths, key lengths or None for self-attention, H, Hkv, D)
CASES = {
    "equal": ([5, 5], None, 4, 2, 16),
    "ragged": ([3, 0, 7, 1], None, 3, 1, 20),
    "cross": ([2, 5, 3], [6, 5, 1], 2, 2, 8),
    "blind": ([4, 2, 3], [2, 0, 3], 2, 1, 8),
    "no rows": ([0, 0], None, 2, 1, 8),
    "no segments": ([], None, 2, 1, 8),
}
ROWS = ["all", "first", "last", "range"]


def _cu(lengths, device="cpu"):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32).to(device)


def _inputs(case, dtype, behind=0, device="cpu"):
    """Return q, k, weights of rows, bias of keys, and boundaries; NaN behind the last segment."""
    torch.manual_seed(0)
    len_q, len_k, heads, heads_k, d = CASES[case] if isinstance(case, str) else case
    len_k = len_q if len_k is None else len_k
    shapes = [(len_q, (heads, d)), (len_k, (heads_k, d)), (len_q, ()), (len_k, ())]
    tensors = [torch.randn(sum(lengths) + behind, *rest) for lengths, rest in shapes]
    for t, (lengths, _) in zip(tensors, shapes, strict=True):
        t[sum(lengths) :] = math.nan
    q, k, weight, bias = (t.to(device) for t in tensors)
    return q.to(dtype), k.to(dtype), weight.abs(), bias, _cu(len_q, device), _cu(len_k, device)


def _range(cu):
    """Return the second to the last but one row of each segment, and more than there is of short ones."""
    return cu[:-1] + 1, torch.where(cu.diff() > 3, cu[1:] - 1, cu[1:] + 2)


def _eager(q, k, cu_q, cu_k, causal, reduce="mean", rows="all", weight=None, bias=None, scale=0.3):
    """Softmax with all weights, segment by segment, in the dtype of q."""
    out = torch.zeros(k.shape[0], dtype=q.dtype)
    bounds = [cu.tolist() for cu in (cu_q, cu_k)]
    for i, (a, b, c, d) in enumerate(zip(*(x for e in bounds for x in (e[:-1], e[1:])), strict=True)):
        first, last = {"all": (a, b), "first": (a, min(a + 1, b)), "last": (max(b - 1, a), b)}.get(rows, (0, 0))
        if rows == "range":
            first, last = (int(t[i]) for t in _range(cu_q))
            last = min(last, b)
        if first >= last or c >= d:
            continue
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        scores = scores if bias is None else scores + bias[c:d].to(q.dtype)
        if causal:
            scores = scores.masked_fill(torch.ones(b - a, d - c).triu(d - c - b + a + 1).bool(), -math.inf)
        p = scores.softmax(-1).nan_to_num(0.0)[:, first - a : last - a]  # (H, rows, keys)
        p = p.mean(1) if weight is None else torch.einsum("hqk,q->hk", p, weight[first:last].to(q.dtype))
        out[c:d] = {"mean": p.mean(0), "sum": p.sum(0), "max": p.amax(0)}[reduce]
    return out


def _scores(q, k, cu_q, cu_k, causal, reduce="mean", rows="all", weight=None, bias=None):
    options = {"causal": causal, "softmax_scale": 0.3, "key_bias": bias}
    _, lse = attention(q, k, k, cu_q, cu_k, 8, 8, return_lse=True, **options)
    rows = _range(cu_q) if rows == "range" else rows
    return attention_scores(q, k, lse, cu_q, cu_k, 8, reduce=reduce, rows=rows, row_weight=weight, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_matches_eager_attention(case, causal, dtype, rows, reduce):
    q, k, _, _, cu_q, cu_k = _inputs(case, dtype)
    got = _scores(strided(q), strided(k), cu_q, cu_k, causal, reduce, rows)
    assert got.dtype == torch.float32
    wanted = [_eager(q.to(t), k.to(t), cu_q, cu_k, causal, reduce, rows) for t in (torch.float32, torch.float64)]
    assert_as_accurate(got, *wanted, ulps=16)


@pytest.mark.parametrize("case", ["ragged", "blind"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_weights_of_rows_and_bias_of_keys_with_rows_behind_the_last_segment(case, causal, rows):
    q, k, weight, bias, cu_q, cu_k = _inputs(case, torch.float32, behind=3)
    got = _scores(q, k, cu_q, cu_k, causal, "mean", rows, weight, bias)
    wide = (t.double() for t in (q, k))
    want = _eager(*wide, cu_q, cu_k, causal, "mean", rows, weight, bias)
    torch.testing.assert_close(got, want.float(), atol=1e-6, rtol=1e-5)
    assert not got[-3:].any()


def test_weights_of_ones_and_a_mask():
    q, k, _, _, cu, _ = _inputs("ragged", torch.float32)
    mean, total = _scores(q, k, cu, cu, False), _scores(q, k, cu, cu, False, weight=torch.ones(q.shape[0]))
    lengths = cu.diff().repeat_interleave(cu.diff())
    torch.testing.assert_close(mean * lengths, total)
    torch.testing.assert_close(total.sum(), torch.tensor(float(q.shape[0])))  # each row gives away 1
    mask = torch.zeros(q.shape[0])
    mask[cu[:-1][cu.diff() > 0].long()] = 1.0
    torch.testing.assert_close(_scores(q, k, cu, cu, False, weight=mask), _scores(q, k, cu, cu, False, rows="first"))


def test_many_rows_go_through_the_reference_in_chunks(monkeypatch):
    q, k, weight, bias, cu, _ = _inputs(([21, 9], None, 2, 1, 8), torch.float32)

    def both():
        args = (q, k, torch.randn(2, 30, generator=torch.Generator().manual_seed(0)), cu, cu, 21, True, 0.3, "sum")
        return [op.attention_scores_reference(*args, None, None, w, bias) for w in (None, weight)]

    whole = both()
    monkeypatch.setattr(op, "CHUNK", 1)
    for w, c in zip(whole, both(), strict=True):
        torch.testing.assert_close(c, w)


def test_has_no_gradient_and_fp64():
    q, k, _, _, cu, _ = _inputs("equal", torch.float64)
    leaves = [t.requires_grad_() for t in (q, k)]
    got = _scores(*leaves, cu, cu, True)
    assert not got.requires_grad
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, _eager(q.detach(), k.detach(), cu, cu, True))


@pytest.mark.parametrize("case", ["equal", "blind"])
def test_opcheck(case):
    q, k, weight, bias, cu_q, cu_k = _inputs(case, torch.float32)
    lse = torch.randn(q.shape[1], q.shape[0])
    for options in ((None,) * 4, (cu_q[:-1].clone(), cu_q[1:].clone(), weight, bias)):
        args = (q.requires_grad_(), k, lse, cu_q, cu_k.clone(), 8, True, 0.3, "mean", *options)
        torch.library.opcheck(torch.ops.fastmllm.attention_scores.default, args)


def test_compile():
    q, k, _, bias, cu_q, cu_k = _inputs("cross", torch.float32)

    def scores(q, k):
        return _scores(q, k, cu_q, cu_k, True, "max", "last", None, bias)

    torch.testing.assert_close(torch.compile(scores, fullgraph=True, backend="aot_eager")(q, k), scores(q, k))


def test_a_segment_does_not_depend_on_its_neighbours_and_repeats():
    q, k, _, _, cu, _ = _inputs("ragged", torch.float32)
    got = _scores(q, k, cu, cu, True)
    assert torch.equal(got, _scores(q, k, cu, cu, True))
    assert torch.equal(got[3:10], _scores(q[3:10], k[3:10], _cu([7]), _cu([7]), True))


def test_rejects_what_does_not_fit():
    q, k, lse, cu = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8), torch.zeros(4, 4), _cu([1, 3])
    with pytest.raises(ValueError, match=r"attention_scores: q \(4, 4, 8\) and k \(4, 3, 8\).*Hkv dividing H"):
        attention_scores(q, torch.zeros(4, 3, 8), lse, cu)
    with pytest.raises(ValueError, match="head dimension 257"):
        attention_scores(torch.zeros(4, 1, 257), torch.zeros(4, 1, 257), lse[:1], cu)
    with pytest.raises(ValueError, match=r"q torch.float32 and k torch.bfloat16"):
        attention_scores(q, k.bfloat16(), lse, cu)
    with pytest.raises(ValueError, match=r"lse \(4, 3\) torch.float32 on cpu must be \(4, 4\)"):
        attention_scores(q, k, lse[:, :3], cu)
    with pytest.raises(ValueError, match=r"cu_seqlens_q \(3,\) torch.int64"):
        attention_scores(q, k, lse, cu.long())
    with pytest.raises(ValueError, match=r"cu_seqlens_k \(2,\) torch.int32 on cpu must be \(3,\)"):
        attention_scores(q, k, lse, cu, _cu([4]))
    with pytest.raises(ValueError, match=r"rows\[1\] \(3,\) torch.int32 on cpu must be \(2,\)"):
        attention_scores(q, k, lse, cu, rows=(cu[:-1], cu))
    with pytest.raises(ValueError, match=r'rows \'cls\' must be "all", "first", "last" or a pair'):
        attention_scores(q, k, lse, cu, rows="cls")
    with pytest.raises(ValueError, match="reduce 'min' must be"):
        attention_scores(q, k, lse, cu, reduce="min")
    with pytest.raises(ValueError, match=r"row_weight \(4,\) torch.bool"):
        attention_scores(q, k, lse, cu, row_weight=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ascend from 0, and end at 5, 5 .*q and k have 4, 4 rows"):
        attention_scores(q, k, lse, _cu([1, 4]))
    for bounds in ([1, 3, 2, 4], [1, 2, 3, 4], [0, 3, 2, 4]):
        wrong, right = (torch.tensor(b, dtype=torch.int32) for b in (bounds, [0, 1, 2, 4]))
        for pair in ((wrong, None), (wrong, right), (right, wrong)):
            with pytest.raises(ValueError, match=r"attention_scores: cu_seqlens must ascend from 0"):
                attention_scores(q, k, lse, *pair)


TRITON = {  # (as in CASES, rows and keys behind the last segment)
    "equal": (([5, 5], None, 2, 1, 16), 0),
    "tails": (([33, 0, 20], None, 1, 1, 24), 0),
    "cross": (([3, 35], [20, 5], 2, 2, 8), 20),
    "blind": (([34, 2, 3], [2, 0, 3], 1, 1, 20), 0),
    "only padding": (([], [], 2, 1, 8), 20),
}


@pytest.mark.parametrize("case", TRITON)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "dtype, rows, reduce",
    [(torch.float32, "all", "mean"), (torch.bfloat16, "all", "max"), (torch.float32, "range", "sum")],
)
def test_triton_matches_reference(case, causal, dtype, rows, reduce, device, guard, monkeypatch):
    if device == "cpu":
        small = (32, 16, 4, 1)
        monkeypatch.setattr(op, "_TILES", dict.fromkeys((16, 32), small))
        monkeypatch.setattr(op, "_config", lambda d, _, make=op._config: make(d, torch.bfloat16))
    shape, behind = TRITON[case]
    q, k, weight, bias, cu_q, cu_k = _inputs(shape, dtype, behind, device)
    longest = [max(lengths, default=0) for lengths in (shape[0], shape[1] or shape[0])]
    options = (None,) * 4 if rows == "all" else (*_range(cu_q), weight, bias)
    _, lse = torch.ops.fastmllm.attention(q, k, k, cu_q, cu_k.clone(), *longest, causal, 0.3, options[3])
    args = (cu_q, cu_k, longest[1], causal, 0.3, reduce)
    got = guard.run(op.attention_scores_triton, q, k, lse, *args, *options)
    assert torch.equal(got, op.attention_scores_triton(q, k, lse, *args, *options))
    want = op.attention_scores_reference(q, k, lse, *args, *options)
    wide = [None if t is None else t.double() if t.is_floating_point() else t for t in options]
    exact = op.attention_scores_reference(q.double(), k.double(), lse.double(), *args, *wide)
    assert_as_accurate(got, want, exact, ulps=16)


def test_a_triton_segment_does_not_depend_on_its_neighbours(device):
    q, k, weight, bias, cu, _ = _inputs(([3, 8], None, 2, 1, 8), torch.float32, 0, device)
    lse = torch.randn(2, 11, device=device)
    alone = _cu([8], device)
    packed = op.attention_scores_triton(q, k, lse, cu, cu, 8, True, 0.3, "sum", None, None, weight, bias)
    rest = (8, True, 0.3, "sum", None, None, weight[3:], bias[3:])
    assert torch.equal(packed[3:], op.attention_scores_triton(q[3:], k[3:], lse[:, 3:], alone, alone, *rest))


def test_one_launch_and_the_mean_of_heads_without_a_look_at_the_data(monkeypatch):
    """Meta tensors hold nothing, so a launcher that made the host wait for a value would raise."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: grids.append(grid)

    monkeypatch.setattr(op, "_scores_kernel", Kernel())
    q, lse = torch.empty(64, 2, 16, device="meta"), torch.empty(2, 64, device="meta")
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    monkeypatch.setattr(op, "_attention_scores", op.attention_scores_triton)
    for rows in ("all", "first", "last"):
        assert attention_scores(q, q, lse, cu, max_seqlen_k=32, rows=rows).shape == (64,)
    assert grids == [(5,)] * 3
