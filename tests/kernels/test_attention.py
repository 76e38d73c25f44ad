"""attention: the operator equals torch's SDPA, Triton equals the operator (flash_attn: test_flash_attn.py)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import _dense
from fastmllm.kernels import attention as op
from fastmllm.kernels.attention import attention

# (query lengths, key lengths or None for self-attention, H, Hkv, D)
CASES = {
    "equal": ([5, 5, 5], None, 4, 2, 16),
    "ragged": ([3, 0, 7, 1], None, 3, 1, 20),
    "cross": ([2, 5, 3], [6, 5, 1], 2, 2, 8),
    "cached": ([1, 1], [4, 4], 4, 2, 8),
    "blind": ([4, 2, 3], [2, 0, 3], 2, 1, 8),
    "equal blind": ([4, 4], [2, 2], 2, 1, 8),
    "no keys": ([2, 2], [0, 0], 2, 1, 8),
    "no rows": ([0, 0], None, 2, 1, 8),
    "no segments": ([], None, 2, 1, 8),
}
MODES = [(name, causal) for name in CASES for causal in (False, True)]


def _cu(lengths, device="cpu"):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32).to(device)


def _inputs(case, dtype, device="cpu"):
    torch.manual_seed(0)
    len_q, len_k, heads, heads_k, d = CASES[case] if isinstance(case, str) else case
    n = sum(len_q if len_k is None else len_k)
    tensors = [torch.randn(sum(len_q), heads, d), torch.randn(n, heads_k, d), torch.randn(n, heads_k, d)]
    cu_k = None if len_k is None else _cu(len_k, device)
    return [t.to(device, dtype) for t in tensors], _cu(len_q, device), cu_k


def _torch(q, k, v, cu_q, cu_k, causal, key_bias=None):
    """SDPA segment by segment, with a dense bottom-right mask."""
    cu_k = cu_q if cu_k is None else cu_k
    out = [q[:0]]
    for a, b, c, d in zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist(), strict=False):
        mask = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device)
        mask = mask.tril(d - c - b + a) if causal else mask
        one = [t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d])]
        seen = mask.any(1)[:, None, None]
        added = torch.zeros(b - a, d - c, dtype=q.dtype).masked_fill(~(mask | ~mask.any(1)[:, None]), -math.inf)
        added = added if key_bias is None else added + key_bias[c:d].to(q.dtype)
        y = F.scaled_dot_product_attention(*one, attn_mask=added, enable_gqa=True)
        out.append(torch.where(seen, y[0].transpose(0, 1), 0.0) if d > c else 0 * q[a:b])
    return torch.cat(out)


def _compare(inputs, cu_q, cu_k, causal, seed, got, got_grads, key_bias=None):
    """Compare the output and the gradients with torch in the same dtype, both against fp64."""
    results = []
    for dtype in (inputs[0].dtype, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = _torch(*leaves, cu_q, cu_k, causal, key_bias)
        zeros = [torch.zeros_like(t) for t in leaves]
        grads = gradients([out], leaves, [seed])
        results.append([out, *[z if g is None else g for g, z in zip(grads, zeros, strict=True)]])
    for g, s, o in zip([got, *got_grads], *results, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


@pytest.mark.parametrize("case, causal", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_matches_torch(case, causal, dtype, biased):
    inputs, cu_q, cu_k = _inputs(case, dtype)
    leaves = [strided(t).requires_grad_() for t in inputs]
    bias = torch.randint(1, 9, inputs[1].shape[:1]).float().log() if biased else None  # ToMe's sizes
    out = attention(*leaves, cu_q, cu_k, causal=causal, key_bias=bias)
    seed = torch.randn(out.shape)
    _compare(inputs, cu_q, cu_k, causal, seed, out, gradients([out], leaves, [seed]), bias)


@pytest.mark.parametrize("d", [64, 72, 80, 88, 96, 128])
def test_head_dimensions_of_towers(d):
    inputs, cu_q, _ = _inputs(([5, 3], None, 2, 1, d), torch.float32)
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = attention(*leaves, cu_q)
    seed = torch.randn(out.shape)
    _compare(inputs, cu_q, None, False, seed, out, gradients([out], leaves, [seed]))


def test_two_dimensional_windows_are_segments():
    """Qwen2.5-VL: windows of a grid, smaller at its edges; rows are ordered by window."""
    torch.manual_seed(0)
    height, width, window = 5, 7, 3
    q, k, v = (torch.randn(height * width, 2, 8) for _ in range(3))
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    which = y // window * 10 + x // window
    order = which.sort(stable=True).indices
    sizes = which[order].unique_consecutive(return_counts=True)[1].tolist()
    out = torch.empty_like(q)
    out[order] = attention(q[order], k[order], v[order], _cu(sizes), max_seqlen_q=window**2)
    mask = which[:, None] == which
    want = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), attn_mask=mask).transpose(0, 1)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("case", ["equal", "ragged", "cross", "no rows", "no segments"])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_behind_the_last_segment_are_never_read_and_become_zeros(case, causal):
    inputs, cu_q, cu_k = _inputs(case, torch.float32)
    bias = torch.randn(inputs[1].shape[0])
    args = (cu_q, cu_q.clone() if cu_k is None else cu_k)
    padded = [torch.cat([t, t.new_full((n, *t.shape[1:]), math.nan)]) for t, n in zip(inputs, (3, 9, 9), strict=True)]
    results = []
    for tensors in (inputs, padded):
        leaves = [t.clone().requires_grad_() for t in tensors]
        extra = leaves[1].shape[0] - bias.numel()
        out, lse = attention(*leaves, *args, 8, 8, causal, key_bias=F.pad(bias, (0, extra), value=math.nan),
                             return_lse=True)  # fmt: skip
        seed = torch.cat([torch.ones_like(inputs[0]), inputs[0].new_full((out.shape[0] - len(inputs[0]), 1, 1),
                          math.nan).expand(-1, *inputs[0].shape[1:])])  # fmt: skip
        results.append([out, lse.T, *gradients([out], leaves, [seed])])
    assert not results[1][1].requires_grad
    for plain, behind in zip(*results, strict=True):
        assert torch.equal(behind[: len(plain)], plain)
        rest = behind[len(plain) :]
        assert torch.equal(rest, torch.full_like(rest, -math.inf if behind is results[1][1] else 0.0))


@pytest.mark.parametrize("causal", [False, True])
def test_returns_the_log_sum_exp(causal):
    (q, k, v), cu_q, cu_k = _inputs("blind", torch.float32)
    out, lse = attention(q, k, v, cu_q, cu_k, causal=causal, return_lse=True, softmax_scale=0.3)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.repeat_interleave(2, 1).double()) * 0.3
    seen = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for a, b, c, d in ((0, 4, 0, 2), (6, 9, 2, 5)):
        seen[a:b, c:d] = torch.ones(b - a, d - c).tril(d - c - b + a).bool() if causal else True
    want = scores.masked_fill(~seen, -math.inf).logsumexp(-1).float()
    torch.testing.assert_close(lse, want)
    assert lse.is_contiguous()
    assert not lse.requires_grad
    assert torch.equal(out[lse[0].isinf()], torch.zeros_like(out[lse[0].isinf()]))


@pytest.mark.parametrize("biased", [False, True])
def test_a_segment_does_not_depend_on_its_neighbours_and_repeats(biased):
    (q, k, v), cu, _ = _inputs("ragged", torch.float32)
    bias = torch.randn(q.shape[0]) if biased else None
    out = attention(q, k, v, cu, key_bias=bias)
    assert torch.equal(out, attention(q, k, v, cu, key_bias=bias))
    alone = attention(q[3:10], k[3:10], v[3:10], _cu([7]), key_bias=None if bias is None else bias[3:10])
    assert torch.equal(out[3:10], alone)


def test_reads_a_packed_qkv_in_place_and_the_scale():
    torch.manual_seed(0)
    qkv = torch.randn(6, 3, 2, 8)
    cu = _cu([2, 4])
    want = _torch(*(t * s for t, s in zip(qkv.unbind(1), (2.0, 1.0, 1.0), strict=True)), cu, None, False)
    torch.testing.assert_close(attention(*qkv.unbind(1), cu, max_seqlen_q=5, softmax_scale=2 * 8**-0.5), want)


@pytest.mark.parametrize("case, causal", MODES)
def test_plain_mathematics_equals_the_fused_cpu_kernel(case, causal, monkeypatch):
    """What runs on a device that has neither Triton nor torch's CPU kernel."""
    inputs, cu_q, cu_k = _inputs(case, torch.float64)
    lengths = [[int(c.diff().max()) if c.numel() > 1 else 0] for c in (cu_q, cu_q if cu_k is None else cu_k)]
    bias = torch.randn(inputs[1].shape[0], dtype=torch.float64)
    args = (*inputs, cu_q, cu_q if cu_k is None else cu_k, *[n[0] for n in lengths], causal, 0.3, bias)
    want = op.attention_reference(*args)
    grad = torch.randn_like(want[0])
    want_grads = op.attention_bwd_reference(grad, *inputs, *want, *args[3:])
    monkeypatch.setattr(_dense, "_fused", lambda q: False)
    got = op.attention_reference(*args)
    got_grads = op.attention_bwd_reference(grad, *inputs, *want, *args[3:])
    for g, w in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("case", ["equal", "ragged", "blind"])
def test_opcheck(case):
    inputs, cu_q, cu_k = _inputs(case, torch.float32)
    inputs = [t.requires_grad_() for t in inputs]
    args = (*inputs, cu_q, cu_q.clone() if cu_k is None else cu_k, 8, 8, True, 0.25)
    torch.library.opcheck(torch.ops.fastmllm.attention.default, args)
    torch.library.opcheck(torch.ops.fastmllm.attention.default, (*args, torch.randn(inputs[1].shape[0])))


@pytest.mark.parametrize("case", ["equal", "cross"])
def test_compile(case):
    inputs, cu_q, cu_k = _inputs(case, torch.float32)
    inputs = [t.requires_grad_() for t in inputs]
    bias = torch.randn(inputs[1].shape[0])

    def block(q, k, v):
        return attention(q, k, v, cu_q, cu_k, 8, 8, causal=True, key_bias=bias)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), block(*inputs))
    seed = torch.randn(inputs[0].shape)
    got, want = (gradients([f(*inputs)], inputs, [seed]) for f in (compiled, block))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    "case, causal",
    [(([2, 2], None, 2, 1, 2), True), (([3, 1], [1, 2], 1, 1, 3), True), (([1, 2], [3, 1], 2, 2, 2), False)],
)
def test_gradcheck(case, causal):
    inputs, cu_q, cu_k = _inputs(case, torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    bias = torch.randn(leaves[1].shape[0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: attention(*t, cu_q, cu_k, causal=causal, key_bias=bias), leaves)


def test_rejects_what_does_not_fit():
    q, k = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)
    cu = _cu([1, 3])
    with pytest.raises(ValueError, match=r"attention: q \(4, 4, 8\), k \(4, 3, 8\).*Hkv dividing H"):
        attention(q, torch.zeros(4, 3, 8), torch.zeros(4, 3, 8), cu)
    with pytest.raises(ValueError, match="head dimension 257"):
        attention(torch.zeros(4, 1, 257), torch.zeros(4, 1, 257), torch.zeros(4, 1, 257), cu)
    with pytest.raises(ValueError, match=r"attention: q torch.float32, k torch.bfloat16"):
        attention(q, k.bfloat16(), k, cu)
    for others in ((k.to("meta"), k), (k, k.to("meta"))):
        with pytest.raises(ValueError, match=r"attention: q is on cpu, k on .* and v on .*: move them to one device"):
            attention(q, *others, cu)
    with pytest.raises(ValueError, match=r"attention: cu_seqlens_q \(3,\) torch.int64"):
        attention(q, k, k, cu.long())
    with pytest.raises(ValueError, match=r"cu_seqlens_q \(3,\) and cu_seqlens_k \(2,\) differ"):
        attention(q, k, k, cu, _cu([4]))
    with pytest.raises(ValueError, match="have different rows: give cu_seqlens_k"):
        attention(q, k[:3], k[:3], cu)
    with pytest.raises(ValueError, match=r"ascend from 0, and end at 5, 5 .*q and k have 4, 4 rows"):
        attention(q, k, k, _cu([1, 4]))
    with pytest.raises(ValueError, match=r"segments of up to 3, 3 rows.*max_seqlen is 2, 2"):
        attention(q, k, k, cu, max_seqlen_q=2)
    with pytest.raises(ValueError, match=r"ascend from 0"):
        attention(q, k, k, torch.tensor([0, 3, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"key_bias \(3,\) torch.float32 .*must be \(4,\) torch.float32"):
        attention(q, k, k, cu, key_bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"key_bias \(4,\) gets no gradient: detach it"):
        attention(q, k, k, cu, key_bias=torch.zeros(4, requires_grad=True))


TRITON = {  # the last two: rows and keys behind the last segment, more than a block of each
    "equal": ([5, 5], None, 2, 1, 16, 0, 0),
    "tails": ([33, 0, 20], None, 1, 1, 24, 0, 0),
    "cross": ([3, 35], [20, 5], 2, 2, 8, 0, 0),
    "blind": ([34, 2, 3], [2, 0, 3], 1, 1, 20, 0, 0),
    "padding": ([3, 4], [5, 2], 2, 1, 8, 40, 20),
    "only padding": ([], [], 1, 1, 8, 5, 4),
}


@pytest.mark.parametrize("case", TRITON)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, biased", [(torch.float32, True), (torch.bfloat16, False)])
def test_triton_matches_reference(case, causal, dtype, biased, device, guard, monkeypatch):
    if device == "cpu":  # one small tile for both dtypes: more blocks, fewer elements
        monkeypatch.setitem(op._TILES, 16, ((32, 16, 4, 1),) * 3)
        monkeypatch.setitem(op._TILES, 32, ((32, 16, 4, 1),) * 3)
    *shape, behind_q, behind_k = TRITON[case]
    inputs, cu_q, cu_k = _inputs(shape, dtype, device)
    cu_k = cu_q if cu_k is None else cu_k
    longest = [max(lengths, default=0) for lengths in (shape[0], shape[1] or shape[0])]
    for i, n in enumerate((behind_q, behind_k, behind_k)):
        inputs[i] = F.pad(inputs[i], (0, 0, 0, 0, 0, n), value=math.nan)
    bias = torch.randn(inputs[1].shape[0], device=device) if biased else None
    args = (cu_q, cu_k, *longest, causal, 0.25)
    got = guard.run(op.attention_triton, *inputs, *args, bias)
    want = op.attention_reference(*inputs, *args, bias)
    wide, wide_bias = [t.double() for t in inputs], bias if bias is None else bias.double()
    exact = op.attention_reference(*wide, *args, wide_bias)
    assert torch.equal(got[1].isneginf(), exact[1].isneginf())
    for g, s, o in zip(got, want, exact, strict=True):
        assert_as_accurate(*(t.nan_to_num(neginf=0.0, nan=math.nan) for t in (g, s, o)), ulps=8)
    grad = torch.randn(inputs[0].shape).to(device, dtype)
    got = guard.run(op.attention_bwd_triton, grad, *inputs, *want, *args, bias)
    want = op.attention_bwd_reference(grad, *inputs, *want, *args, bias)
    exact = op.attention_bwd_reference(grad.double(), *wide, *exact, *args, wide_bias)
    for g, s, o in zip(got, want, exact, strict=True):
        assert_as_accurate(g, s, o, ulps=8)
    guard.check()


@pytest.mark.parametrize("d", [64, 72, 80, 88, 96, 128])
def test_triton_has_the_head_dimensions_of_towers(d, device, guard):
    inputs, cu, _ = _inputs(([5, 3], None, 1, 1, d), torch.float32, device)
    args = (cu, cu, 5, 5, False, d**-0.5)
    want = op.attention_reference(*inputs, *args)
    for g, w in zip(guard.run(op.attention_triton, *inputs, *args), want, strict=True):
        torch.testing.assert_close(g, w)
    grad = torch.randn(inputs[0].shape, device=device)
    got = guard.run(op.attention_bwd_triton, grad, *inputs, *want, *args)
    for g, w in zip(got, op.attention_bwd_reference(grad, *inputs, *want, *args), strict=True):
        torch.testing.assert_close(g, w, atol=2e-6, rtol=1e-5)


def test_a_triton_segment_does_not_depend_on_its_neighbours_and_repeats(device):
    (q, k, v), cu, _ = _inputs(([3, 8], None, 1, 1, 8), torch.float32, device)
    bias, grad = torch.randn(11, device=device), torch.randn(q.shape, device=device)

    def both(rows, *rest):
        one = [t[rows] for t in (q, k, v)]
        out = op.attention_triton(*one, *rest, True, 0.3, bias[rows])
        return (out[0], out[1].T, *op.attention_bwd_triton(grad[rows], *one, *out, *rest, True, 0.3, bias[rows]))

    packed, again = (both(slice(None), cu, cu, 8, 8) for _ in range(2))
    alone = both(slice(3, None), *[_cu([8], device)] * 2, 8, 8)
    for p, r, a in zip(packed, again, alone, strict=True):
        assert torch.equal(p, r)
        assert torch.equal(p[3:], a)


@pytest.mark.parametrize("case", ["equal", "blind", "padding"])
def test_frozen_inputs_cost_no_gradient(case, device):
    *shape, behind, _ = TRITON[case]
    inputs, cu_q, cu_k = _inputs(shape, torch.float32, device)
    inputs = [F.pad(t, (0, 0, 0, 0, 0, behind)) for t in inputs]
    args = (cu_q, cu_q if cu_k is None else cu_k, 40, 40, True, 0.3)
    saved = (torch.ones_like(inputs[0]), *inputs, *op.attention_reference(*inputs, *args), *args, None)
    full = op.attention_bwd_reference(*saved)
    for function in (op.attention_bwd_reference, op.attention_bwd_triton):
        dq, dk, dv = function(*saved, True, False)
        assert (dq.shape, dk.numel(), dv.numel()) == (inputs[0].shape, 0, 0)
        torch.testing.assert_close(dq, full[0], atol=2e-6, rtol=1e-5)
        dq, dk, dv = function(*saved, False, True)
        assert dq.numel() == 0
        torch.testing.assert_close((dk, dv), full[1:], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_autograd_asks_for_the_gradients_that_are_needed(trained, monkeypatch):
    inputs, cu_q, _ = _inputs("ragged", torch.float32)
    asked = []
    monkeypatch.setattr(
        op, "_attention_bwd", lambda *args, inner=op._attention_bwd: asked.append(args[-2:]) or inner(*args)
    )
    leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(inputs)]
    attention(*leaves, cu_q).sum().backward()
    assert asked == [(0 in trained, 1 in trained or 2 in trained)]
    every = [t.clone().requires_grad_() for t in inputs]
    attention(*every, cu_q).sum().backward()
    for i, (leaf, one) in enumerate(zip(leaves, every, strict=True)):
        assert (leaf.grad is not None) == (i in trained)
        if i in trained:
            torch.testing.assert_close(leaf.grad, one.grad)


class _NoDevice:
    """Stand where a kernel stands, and count its launches."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.grids.append(grid)


def test_one_launch_forward_two_backward_and_no_look_at_the_data(monkeypatch):
    """Meta tensors hold nothing, so a launcher that made the host wait for a value would raise."""
    kernels = [_NoDevice() for _ in range(3)]
    for name, kernel in zip(("_fwd_kernel", "_dq_kernel", "_dkv_kernel"), kernels, strict=True):
        monkeypatch.setattr(op, name, kernel)
    q, cu = torch.empty(64, 2, 16, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    args = (cu, cu, 32, 32, False, 0.25, torch.empty(64, device="meta"))
    out = op.attention_triton(q, q, q, *args)
    op.attention_bwd_triton(q, q, q, q, *out, *args)
    assert [k.grids for k in kernels] == [[(5,)]] * 3
    op.attention_bwd_triton(q, q, q, q, *out, *args, True, False)
    assert [len(k.grids) for k in kernels] == [1, 2, 1], "frozen keys launch nothing of their own"


def test_triton_takes_strided_rows_and_a_stride_0_gradient(device):
    torch.manual_seed(0)
    qkv = torch.randn(5, 3, 2, 8, device=device)
    cu = _cu([2, 3], device)
    args = (cu, cu, 3, 3, True, 0.3)
    parts = qkv.unbind(1)
    want = op.attention_reference(*parts, *args)
    for g, w in zip(op.attention_triton(*parts, *args), want, strict=True):
        torch.testing.assert_close(g, w)
    grad = torch.ones((), device=device).expand(5, 2, 8)
    got = op.attention_bwd_triton(grad, *parts, *want, *args)
    for g, w in zip(got, op.attention_bwd_reference(grad, *parts, *want, *args), strict=True):
        torch.testing.assert_close(g, w, atol=2e-6, rtol=1e-5)
