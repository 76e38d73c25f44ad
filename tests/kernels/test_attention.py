"""attention: the operator equals torch's SDPA, Triton equals the operator, flash_attn is called as documented."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import _dense, _flash_attn
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
    leaves = [t[:, :, :3].contiguous().requires_grad_() for t in inputs]
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
    with pytest.raises(ValueError, match=r"ascend from 0, and end at 5, 5 .*q and k have 4, 4 rows"):
        attention(q, k, k, _cu([1, 4]))
    with pytest.raises(ValueError, match=r"segments of up to 3, 3 rows.*max_seqlen is 2, 2"):
        attention(q, k, k, cu, max_seqlen_q=2)


TRITON = {
    "equal": ([5, 5], None, 2, 1, 16),
    "tails": ([33, 0, 40], None, 1, 1, 24),
    "cross": ([3, 35], [40, 5], 2, 2, 8),
    "blind": ([34, 2, 3], [2, 0, 3], 1, 1, 20),
}


@pytest.mark.parametrize("case", TRITON)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_matches_reference(case, causal, dtype, device, guard, monkeypatch):
    if device == "cpu":  # one small tile for both dtypes: more blocks, fewer elements
        monkeypatch.setitem(op._TILES, 16, ((32, 16, 4, 1),) * 3)
        monkeypatch.setitem(op._TILES, 32, ((32, 16, 4, 1),) * 3)
    inputs, cu_q, cu_k = _inputs(TRITON[case], dtype, device)
    cu_k = cu_q if cu_k is None else cu_k
    args = (cu_q, cu_k, 40, 40, causal, 0.25)
    got = guard.run(op.attention_triton, *inputs, *args)
    want = op.attention_reference(*inputs, *args)
    wide = [t.double() for t in inputs]
    exact = op.attention_reference(*wide, *args)
    assert torch.equal(got[1].isinf(), exact[1].isinf())
    for g, s, o in zip(got, want, exact, strict=True):
        assert_as_accurate(*(t.nan_to_num(neginf=0.0) for t in (g, s, o)), ulps=8)
    grad = torch.randn(inputs[0].shape).to(device, dtype)
    got = guard.run(op.attention_bwd_triton, grad, *inputs, *want, *args)
    want = op.attention_bwd_reference(grad, *inputs, *want, *args)
    exact = op.attention_bwd_reference(grad.double(), *wide, *exact, *args)
    for g, s, o in zip(got, want, exact, strict=True):
        assert_as_accurate(g, s, o, ulps=8)
    guard.check()


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


def _dense_stand_in(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    assert q.dim() == k.dim() == v.dim() == 3
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert isinstance(max_q, int)
    assert isinstance(max_k, int)
    return torch.ops.fastmllm.attention(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale)


# The packages' documented signatures, as of flash-attn 2.8, hopper 3.0 and flash-attn-4 4.0.
def _fa2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert dropout_p == 0.0
    out, lse = _dense_stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    return (out, lse, None) if return_attn_probs else out


def _fa3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    assert seqused_q is None
    return _dense_stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)[0]


def _fa4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    return_lse=False,
):  # fmt: skip
    assert qv is None
    return _dense_stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)


STAND_INS = {  # generation: (distribution, module, varlen function, compute capability that prefers it)
    "FA2": ("flash_attn", "flash_attn", _fa2, 8),
    "FA3": ("flash_attn_3", "flash_attn_interface", _fa3, 9),
    "FA4": ("flash_attn_4", "flash_attn.cute", _fa4, 10),
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution for one test: its metadata on the path, and its modules or nothing to import."""

    def add(distribution, module, function=None):
        info = tmp_path / f"{distribution}-9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution.replace('_', '-')}\nVersion: 9.9\n")
        for part in (module.split(".")[0], module):
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part) if function else None)
        if function:
            sys.modules[module].flash_attn_varlen_func = function

    monkeypatch.syspath_prepend(str(tmp_path))
    _flash_attn.load.cache_clear()
    yield add
    _flash_attn.load.cache_clear()


@pytest.mark.parametrize("name", STAND_INS)
def test_flash_attn_is_called_as_it_documents_itself(name, install, monkeypatch):
    distribution, module, function, capability = STAND_INS[name]
    calls = []
    install(distribution, module, lambda *a, **k: calls.append(name) or function(*a, **k))
    monkeypatch.setattr(_flash_attn, "_capability", lambda q: capability)
    inputs, cu_q, cu_k = _inputs(([3, 4], [5, 4], 4, 2, 32), torch.bfloat16)
    got = attention(*inputs, cu_q, cu_k, causal=True)
    assert calls == [name]
    want = attention(*[t.float() for t in inputs], cu_q, cu_k, causal=True)
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)
    assert calls == [name], "float32 goes to our own kernels"
    attention(*[t[..., :6] for t in inputs], cu_q, cu_k)
    assert calls == [name], "flash_attn takes head dimensions that are multiples of 8"
    assert "9.9" in _flash_attn.flash_attn_status()[name]


def test_a_broken_flash_attn_is_named_once_and_passed_over(install, monkeypatch):
    """A build without a GPU leaves an installed distribution that cannot be imported."""
    install("flash_attn", "flash_attn")
    monkeypatch.setattr(_flash_attn, "_capability", lambda q: 8)
    inputs, cu_q, cu_k = _inputs("ragged", torch.bfloat16)
    inputs = [F.pad(t, (0, 4)) for t in inputs]  # 24 columns
    with pytest.warns(UserWarning, match="flash-attn 9.9 is installed but does not work"):
        got = attention(*inputs, cu_q, cu_k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(got, attention(*inputs, cu_q, cu_k))
    assert "does not work" in _flash_attn.flash_attn_status()["FA2"]
    assert _flash_attn.flash_attn_status()["FA3"] == "flash-attn-3 is not installed"
