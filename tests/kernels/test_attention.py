"""attention: the operator equals torch's SDPA, Triton equals the operator, flash_attn is called as documented."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided

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


def _torch(q, k, v, cu_q, cu_k, causal):
    """SDPA segment by segment, with a dense bottom-right mask."""
    cu_k = cu_q if cu_k is None else cu_k
    out = [q[:0]]
    for a, b, c, d in zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist(), strict=False):
        mask = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device)
        mask = mask.tril(d - c - b + a) if causal else mask
        one = [t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d])]
        seen = mask.any(1)[:, None, None]
        y = F.scaled_dot_product_attention(*one, attn_mask=mask | ~mask.any(1)[:, None], enable_gqa=True)
        out.append(torch.where(seen, y[0].transpose(0, 1), 0.0) if d > c else 0 * q[a:b])
    return torch.cat(out)


def _compare(inputs, cu_q, cu_k, causal, seed, got, got_grads):
    """Compare the output and the gradients with torch in the same dtype, both against fp64."""
    results = []
    for dtype in (inputs[0].dtype, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = _torch(*leaves, cu_q, cu_k, causal)
        zeros = [torch.zeros_like(t) for t in leaves]
        grads = gradients([out], leaves, [seed])
        results.append([out, *[z if g is None else g for g, z in zip(grads, zeros, strict=True)]])
    for g, s, o in zip([got, *got_grads], *results, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


@pytest.mark.parametrize("case, causal", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_torch(case, causal, dtype):
    inputs, cu_q, cu_k = _inputs(case, dtype)
    leaves = [strided(t).requires_grad_() for t in inputs]
    out = attention(*leaves, cu_q, cu_k, causal=causal)
    seed = torch.randn(out.shape)
    _compare(inputs, cu_q, cu_k, causal, seed, out, gradients([out], leaves, [seed]))


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
    args = (*inputs, cu_q, cu_q if cu_k is None else cu_k, *[n[0] for n in lengths], causal, 0.3)
    want = op.attention_reference(*args)
    grad = torch.randn_like(want[0])
    want_grads = op.attention_bwd_reference(grad, *inputs, *want, *args[3:])
    monkeypatch.setattr(op, "_fused", lambda q: False)
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


@pytest.mark.parametrize("case", ["equal", "cross"])
def test_compile(case):
    inputs, cu_q, cu_k = _inputs(case, torch.float32)
    inputs = [t.requires_grad_() for t in inputs]

    def block(q, k, v):
        return attention(q, k, v, cu_q, cu_k, 8, 8, causal=True)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), block(*inputs))
    seed = torch.randn(inputs[0].shape)
    got, want = (gradients([f(*inputs)], inputs, [seed]) for f in (compiled, block))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("case, causal", [("equal", True), ("blind", True), ("cross", False)])
def test_gradcheck(case, causal):
    inputs, cu_q, cu_k = _inputs(case, torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, cu_q, cu_k, causal=causal), leaves)


def test_rejects_what_does_not_fit():
    q, k = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)
    cu = _cu([1, 3])
    with pytest.raises(ValueError, match=r"attention: q \(4, 4, 8\), k \(4, 3, 8\).*Hkv dividing H"):
        attention(q, torch.zeros(4, 3, 8), torch.zeros(4, 3, 8), cu)
    with pytest.raises(ValueError, match="head dimension 257"):
        attention(torch.zeros(4, 1, 257), torch.zeros(4, 1, 257), torch.zeros(4, 1, 257), cu)
    with pytest.raises(ValueError, match=r"attention: q torch.float32, k torch.bfloat16"):
        attention(q, k.bfloat16(), k, cu)
    with pytest.raises(ValueError, match=r"attention: cu_seqlens_q \(3,\) torch.int64"):
        attention(q, k, k, cu.long())
    with pytest.raises(ValueError, match=r"cu_seqlens_q \(3,\) and cu_seqlens_k \(2,\) differ"):
        attention(q, k, k, cu, _cu([4]))
    with pytest.raises(ValueError, match="have different rows: give cu_seqlens_k"):
        attention(q, k[:3], k[:3], cu)
    with pytest.raises(ValueError, match=r"cu_seqlens end at 3, 3 .*q and k have 4, 4 rows"):
        attention(q, k, k, _cu([1, 2]))
    with pytest.raises(ValueError, match=r"segments of up to 3, 3 rows.*max_seqlen is 2, 2"):
        attention(q, k, k, cu, max_seqlen_q=2)
