"""cross_attention: the operator equals masked SDPA, Triton equals the operator, the ranges are those of Flamingo."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import _dense
from fastmllm.kernels import cross_attention as op
from fastmllm.kernels.cross_attention import cross_attention, media_ranges

# (ranges of the rows, keys, H, Hkv, D)
CASES = {
    "latest": ([(0, 0)] * 2 + [(0, 4)] * 3 + [(4, 9)] * 4, 9, 4, 2, 16),
    "all previous": ([(0, 3)] * 2 + [(0, 7)] * 3 + [(7, 7)] + [(7, 11)] * 2, 11, 3, 1, 20),
    "overlapping": ([(2, 6), (0, 3), (5, 6), (1, 8), (6, 2), (1, 8)], 8, 2, 2, 8),
    "everything": ([(0, 5)] * 4, 5, 2, 1, 32),
    "beyond the keys": ([(-3, 2), (4, 9), (7, 9)], 5, 2, 1, 8),
    "no media": ([(0, 0)] * 3, 0, 2, 1, 8),
    "no rows": ([], 4, 2, 1, 8),
}


def _inputs(case, dtype, device="cpu"):
    torch.manual_seed(0)
    ranges, n, heads, heads_k, d = CASES[case] if isinstance(case, str) else case
    tensors = torch.randn(len(ranges), heads, d), torch.randn(n, heads_k, d), torch.randn(n, heads_k, d)
    bounds = torch.tensor(ranges, dtype=torch.int32).reshape(-1, 2).to(device)
    return [t.to(device, dtype) for t in tensors], bounds[:, 0], bounds[:, 1]


def _torch(q, k, v, start, stop):
    """SDPA under one dense mask; rows that see nothing are set to zero."""
    cols = torch.arange(k.shape[0], device=q.device)
    mask = (cols >= start[:, None]) & (cols < stop[:, None])
    seen = mask.any(1)
    if not k.shape[0]:
        return 0 * q
    dense = [t.transpose(0, 1)[None] for t in (q, k, v)]
    y = F.scaled_dot_product_attention(*dense, attn_mask=mask | ~seen[:, None], enable_gqa=True)
    return torch.where(seen[:, None, None], y[0].transpose(0, 1), 0.0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_torch(case, dtype):
    inputs, start, stop = _inputs(case, dtype)
    seed = torch.randn(inputs[0].shape)
    results = []
    for kind in (dtype, torch.float64):
        leaves = [t.to(kind).requires_grad_() for t in inputs]
        out = _torch(*leaves, start, stop)
        grads = gradients([out], leaves, [seed])
        results.append([out, *[torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]])
    leaves = [strided(t).requires_grad_() for t in inputs]
    out = cross_attention(*leaves, start, stop)
    for g, s, o in zip([out, *gradients([out], leaves, [seed])], *results, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


def test_rows_without_media_are_zero_and_pass_no_gradient():
    inputs, start, stop = _inputs("latest", torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    out = cross_attention(*leaves, start, stop)
    out.sum().backward()
    assert not out[:2].any()
    assert not leaves[0].grad[:2].any()
    assert out[2:].all()


def test_a_text_attends_only_to_its_own_image():
    """Changing an image changes the rows that see it, and no others."""
    inputs, start, stop = _inputs("latest", torch.float32)
    before = cross_attention(*inputs, start, stop)
    inputs[2][4:] += 1
    changed = (cross_attention(*inputs, start, stop) - before).abs().amax((1, 2)) > 0
    assert changed.tolist() == [False] * 5 + [True] * 4


def test_plain_mathematics_equals_the_fused_cpu_kernel(monkeypatch):
    inputs, start, stop = _inputs("overlapping", torch.float64)
    want = op.cross_attention_reference(*inputs, start, stop, 0.3)
    grad = torch.randn_like(want[0])
    want_grads = op.cross_attention_bwd_reference(grad, *inputs, *want, start, stop, 0.3)
    monkeypatch.setattr(_dense, "_fused", lambda q: False)
    got = op.cross_attention_reference(*inputs, start, stop, 0.3)
    got_grads = op.cross_attention_bwd_reference(grad, *inputs, *want, start, stop, 0.3)
    for g, w in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        torch.testing.assert_close(g, w)


TRITON = {
    "latest": ([(0, 0)] * 3 + [(0, 20)] * 30 + [(20, 37)] * 5, 37, 2, 1, 24),
    "all previous": ([(0, 20)] * 2 + [(0, 37)] * 3, 37, 2, 2, 8),
    "overlapping": CASES["overlapping"],
    "beyond the keys": CASES["beyond the keys"],
    "no media": CASES["no media"],
}


@pytest.mark.parametrize("case", TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_matches_reference(case, dtype, device, guard, monkeypatch):
    if device == "cpu":  # one small tile for both dtypes: more blocks, fewer elements
        monkeypatch.setitem(op._TILES, 16, ((32, 16, 4, 1),) * 3)
        monkeypatch.setitem(op._TILES, 32, ((32, 16, 4, 1),) * 3)
        monkeypatch.setattr(op, "SCAN", 16)
    inputs, *ranges = _inputs(TRITON[case], dtype, device)
    got = guard.run(op.cross_attention_triton, *inputs, *ranges, 0.25)
    want = op.cross_attention_reference(*inputs, *ranges, 0.25)
    wide = [t.double() for t in inputs]
    exact = op.cross_attention_reference(*wide, *ranges, 0.25)
    assert torch.equal(got[1].isinf(), exact[1].isinf())
    for g, s, o in zip(got, want, exact, strict=True):
        assert_as_accurate(*(t.nan_to_num(neginf=0.0) for t in (g, s, o)), ulps=8)
    grad = torch.randn(inputs[0].shape).to(device, dtype)
    got = guard.run(op.cross_attention_bwd_triton, grad, *inputs, *want, *ranges, 0.25)
    want = op.cross_attention_bwd_reference(grad, *inputs, *want, *ranges, 0.25)
    exact = op.cross_attention_bwd_reference(grad.double(), *wide, *exact, *ranges, 0.25)
    for g, s, o in zip(got, want, exact, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


def test_triton_takes_strided_rows_and_a_stride_0_gradient(device):
    inputs, *ranges = _inputs(([(0, 3)] * 2 + [(3, 5)] * 3, 5, 2, 2, 8), torch.float32, device)
    kv = torch.stack(inputs[1:], 1)  # one projection, keys beside values
    inputs = [inputs[0], *kv.unbind(1)]
    want = op.cross_attention_reference(*inputs, *ranges, 0.3)
    for g, w in zip(op.cross_attention_triton(*inputs, *ranges, 0.3), want, strict=True):
        torch.testing.assert_close(g, w)
    grad = torch.ones((), device=device).expand(5, 2, 8)
    got = op.cross_attention_bwd_triton(grad, *inputs, *want, *ranges, 0.3)
    for g, w in zip(got, op.cross_attention_bwd_reference(grad, *inputs, *want, *ranges, 0.3), strict=True):
        torch.testing.assert_close(g, w, atol=2e-6, rtol=1e-5)


def test_opcheck():
    inputs, *ranges = _inputs("latest", torch.float32)
    torch.library.opcheck(
        torch.ops.fastmllm.cross_attention.default, (*[t.requires_grad_() for t in inputs], *ranges, 0.25)
    )


def test_compile():
    inputs, *_ = _inputs("latest", torch.float32)
    inputs = [t.requires_grad_() for t in inputs]
    is_media = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    cu_q, cu_k = torch.tensor([0, 9], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)

    def block(q, k, v):
        return cross_attention(q, k, v, *media_ranges(is_media, cu_q, cu_k))

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), block(*inputs))


@pytest.mark.parametrize("case", ["latest", "overlapping"])
def test_gradcheck(case):
    inputs, *ranges = _inputs(case, torch.float64)
    inputs = [t[:, :, :4].contiguous().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: cross_attention(*t, *ranges), inputs)


def test_rejects_what_does_not_fit():
    q, k = torch.zeros(3, 4, 8), torch.zeros(5, 2, 8)
    start = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cross_attention: q \(3, 4, 8\), k \(5, 3, 8\).*Hkv dividing H"):
        cross_attention(q, torch.zeros(5, 3, 8), torch.zeros(5, 3, 8), start, start)
    with pytest.raises(ValueError, match="head dimension 129"):
        cross_attention(torch.zeros(3, 1, 129), torch.zeros(5, 1, 129), torch.zeros(5, 1, 129), start, start)
    with pytest.raises(ValueError, match="one floating dtype"):
        cross_attention(q, k.bfloat16(), k, start, start)
    with pytest.raises(ValueError, match=r"media_stop \(3,\) torch.int64.*\(3,\) int32"):
        cross_attention(q, k, k, start, start.long())
    with pytest.raises(ValueError, match=r"media_start \(2,\).*one entry a row of q \(3, 4, 8\)"):
        cross_attention(q, k, k, start[:2], start)


# media_ranges ---------------------------------------------------------------------------------------------------------
def _flamingo_mask(is_media, cu_q, cu_k, policy):
    """OpenFlamingo's rule, sample by sample: text_time is the running count of images, media_time numbers them."""
    mask = torch.zeros(is_media.numel(), int(cu_k[-1]), dtype=torch.bool)
    image = 0
    for a, b in zip(cu_q.tolist(), cu_q[1:].tolist(), strict=False):
        text_time = is_media[a:b].cumsum(0)
        for media_time in range(1, int(is_media[a:b].sum()) + 1):
            sees = text_time == media_time if policy == "latest" else text_time >= media_time
            mask[a:b, cu_k[image] : cu_k[image + 1]] = sees[:, None]
            image += 1
    return mask


@pytest.mark.parametrize("policy", ["latest", "all_previous"])
@pytest.mark.parametrize(
    "marks, cu_q, cu_k",
    [
        ([0, 1, 0, 0, 1, 0, 0, 0, 1, 0], [0, 6, 7, 10], [0, 3, 3, 8]),  # an image of no tokens, a sample of no image
        ([1, 1, 0, 0, 0], [0, 0, 5, 5], [0, 2, 7]),  # empty samples, two images in a row
        ([0, 0, 0], [0, 1, 3], [0]),  # text only
        ([], [0], [0]),
    ],
)
def test_media_ranges_are_those_of_flamingo(marks, cu_q, cu_k, policy):
    is_media = torch.tensor(marks, dtype=torch.bool)
    cu_q, cu_k = (torch.tensor(t, dtype=torch.int32) for t in (cu_q, cu_k))
    start, stop = media_ranges(is_media, cu_q, cu_k, policy)
    assert start.dtype == stop.dtype == torch.int32
    cols = torch.arange(int(cu_k[-1]))
    got = (cols >= start[:, None]) & (cols < stop[:, None])
    assert torch.equal(got, _flamingo_mask(is_media, cu_q, cu_k, policy))


def test_media_ranges_reject_what_does_not_fit():
    is_media, cu = torch.tensor([True, False]), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match='policy \'newest\' must be "latest" or "all_previous"'):
        media_ranges(is_media, cu, cu, "newest")
    with pytest.raises(ValueError, match=r"is_media \(2,\) torch.int64"):
        media_ranges(is_media.long(), cu, cu)
    with pytest.raises(ValueError, match=r"marks 1 rows, but cu_seqlens_k \(3,\) bounds 2 images"):
        media_ranges(is_media, cu, torch.tensor([0, 1, 2], dtype=torch.int32))
