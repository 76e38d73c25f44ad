"""cross_attention: the operator equals masked SDPA, Triton equals the operator, the ranges are those of Flamingo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import _dense, _split
from fastmllm.kernels import cross_attention as op
from fastmllm.kernels.cross_attention import cross_attention, mask_ranges, media_ranges, segment_ranges

PLAIN = (0, 0, 0.3)  # no hint of sizes, and the scale
BOTH = (*PLAIN, True, True)  # gradients of queries and of keys

# (ranges of the rows, keys, H, Hkv, D)
CASES = {
    "latest": ([(0, 0)] * 2 + [(0, 4)] * 3 + [(4, 9)] * 4, 9, 4, 2, 16),
    "all previous": ([(0, 3)] * 2 + [(0, 7)] * 3 + [(7, 7)] + [(7, 11)] * 2, 11, 3, 1, 20),
    "overlapping": ([(2, 6), (0, 3), (5, 6), (1, 8), (6, 2), (1, 8)], 8, 2, 2, 8),
    "many keys": ([(0, 230)] * 3 + [(20, 240)] * 2, 240, 4, 2, 8),
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
    want = op.cross_attention_reference(*inputs, start, stop, *PLAIN)
    grad = torch.randn_like(want[0])
    want_grads = op.cross_attention_bwd_reference(grad, *inputs, *want, start, stop, *BOTH)
    monkeypatch.setattr(_dense, "_fused", lambda q: False)
    got = op.cross_attention_reference(*inputs, start, stop, *PLAIN)
    got_grads = op.cross_attention_bwd_reference(grad, *inputs, *want, start, stop, *BOTH)
    for g, w in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        torch.testing.assert_close(g, w)


TRITON = {
    "latest": ([(0, 0)] * 3 + [(0, 20)] * 30 + [(20, 26)] * 5, 26, 2, 1, 24),
    "all previous": ([(0, 20)] * 2 + [(0, 37)] * 3, 37, 2, 2, 8),
    "overlapping": ([(2, 6), (0, 3), (1, 8), (6, 2), (1, 8)], 8, 2, 2, 8),
    "beyond the keys": CASES["beyond the keys"],
    "no media": CASES["no media"],
}


def _small_tiles(device, monkeypatch):
    if device == "cpu":  # one small tile for both dtypes: more blocks, fewer elements
        monkeypatch.setitem(op._TILES, 16, ((32, 16, 4, 1),) * 3)
        monkeypatch.setitem(op._TILES, 32, ((32, 16, 4, 1),) * 3)
        monkeypatch.setattr(op, "SCAN", 16)


def _check_triton(guard, inputs, ranges, grad, options):
    """Compare both launchers with the reference, calibrated by fp64."""
    wide = [t.double() for t in inputs]
    got = guard.run(op.cross_attention_triton, *inputs, *ranges, *options)
    want = op.cross_attention_reference(*inputs, *ranges, *options)
    exact = op.cross_attention_reference(*wide, *ranges, *options)
    assert torch.equal(got[1].isinf(), exact[1].isinf())
    for g, s, o in zip(got, want, exact, strict=True):
        assert_as_accurate(*(t.nan_to_num(neginf=0.0) for t in (g, s, o)), ulps=8)
    got = guard.run(op.cross_attention_bwd_triton, grad, *inputs, *want, *ranges, *options, True, True)
    want = op.cross_attention_bwd_reference(grad, *inputs, *want, *ranges, *options, True, True)
    exact = op.cross_attention_bwd_reference(grad.double(), *wide, *exact, *ranges, *options, True, True)
    for g, s, o in zip(got, want, exact, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


@pytest.mark.parametrize("case", TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_matches_reference(case, dtype, device, guard, monkeypatch):
    _small_tiles(device, monkeypatch)
    inputs, *ranges = _inputs(TRITON[case], dtype, device)
    _check_triton(guard, inputs, ranges, torch.randn(inputs[0].shape).to(device, dtype), PLAIN)


# (ranges of the rows, keys, H, Hkv, D), rows that share a range, keys of the longest range, parts of the keys
SPLIT = {
    "latents": (([(0, 36)] * 3 + [(36, 50)] * 3, 50, 1, 1, 20), 3, 36, 2),
    "decoding, GQA": (([(0, 20), (20, 32), (0, 0)], 32, 4, 1, 16), 1, 32, 2),
    "group of three": (([(3, 36)] * 3, 36, 3, 1, 8), 1, 36, 2),
    "a part without keys": (([(0, 33)] * 2 + [(33, 34)], 34, 1, 1, 8), 2, 33, 2),
    "many parts": (([(0, 65)] * 2, 65, 1, 1, 8), 2, 65, 4),
}


@pytest.mark.parametrize("case", SPLIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_splits_the_keys_of_few_queries(case, dtype, device, guard, monkeypatch):
    _small_tiles(device, monkeypatch)
    monkeypatch.setattr(_split, "PART_BLOCKS", 1)
    spec, rows, keys, parts = SPLIT[case]
    if device == "cpu":
        monkeypatch.setitem(op._FP32_TILES, False, ((32, 16, 4, 1),) * 3)
        inputs, *_ = _inputs(spec, dtype)
        assert op._plan(0, inputs[0], inputs[1], rows, keys)[2] == parts
    inputs, *ranges = _inputs(spec, dtype, device)
    _check_triton(guard, inputs, ranges, torch.randn(inputs[0].shape).to(device, dtype), (rows, keys, 0.25))


def test_the_split_follows_sizes_that_the_host_knows():
    """Parts fill the GPU where few queries leave it empty, and never where they do not."""
    assert _split.part_count(8, 6404, 32, 4) == 33  # Llama-3.2-Vision decodes one token: 8 key heads, 4 tiles
    assert _split.part_count(64, 6400, 32, 256) == 4  # CogAgent, 256 rows of 32 heads in tiles of 128
    assert _split.part_count(8, 10000, 64, 64) == 33  # Perceiver: 64 latents of 8 heads
    assert _split.part_count(16, 4900, 32, 256) == 4  # Idefics2: more parts would cost what they save
    assert _split.part_count(8, 64, 64, 64) == 1  # Flamingo: 64 keys are one block
    assert _split.part_count(264, 6404, 32, 4) == 1
    assert _split.part_count(1, 10**6, 32, 1) == _split.MAX_PARTS
    decoding = op._config(0, torch.bfloat16, 128, 4, 1)
    assert (decoding["BLOCK_M"], decoding["PACK"]) == (16, 4)  # four heads read their keys once
    assert op._config(0, torch.bfloat16, 64, 1, 32)["BLOCK_M"] == 32  # a tile is the 32 latents of one image
    assert (op._config(0, torch.bfloat16, 128, 4, 512)["PACK"], op._config(2, torch.bfloat16, 64, 1, 1)["BLOCK_M"]) == (
        1,
        32,
    )


@pytest.mark.parametrize("shape", [(64, 4900, 16, 4, 96), (1, 6404, 32, 8, 128), (512, 1601, 32, 8, 128)])
def test_tiles_and_parts_do_not_follow_the_batch(shape):
    rows, keys, heads, heads_k, d = shape
    plans = []
    for images in (1, 2, 4, 8):
        q, k = (torch.empty(images * n, h, d, device="meta") for n, h in ((rows, heads), (keys, heads_k)))
        plans.append([op._plan(kind, q, k, rows, keys)[::2] for kind in (0, 1)])
    assert all(plan == plans[0] for plan in plans)


# ranges of the rows, H, Hkv, rows and keys of the sample that is looked at, both longest lengths
NEIGHBOURS = {
    "whole": ([(0, 0)] + [(0, 20)] * 3 + [(20, 37)] * 18, 1, 1, slice(4, 22), slice(20, 37), (18, 20)),
    "split": ([(0, 3)] * 15 + [(3, 35)] * 2, 1, 1, slice(15, 17), slice(3, 35), (2, 32)),
    "all images so far": ([(0, 5)] * 3 + [(5, 8)] * 2 + [(5, 25)] * 3, 1, 1, slice(3, 8), slice(5, 25), (3, 20)),
}


def _matmul_in_order(a, b, **_):
    """Sum each element in one order: BLAS chooses it by where in the tile an element lies, tensor cores do not."""
    out = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for i in range(a.shape[1]):
        out += np.outer(a[:, i], b[i])
    return out


@pytest.mark.parametrize("case", NEIGHBOURS)
def test_a_sample_does_not_depend_on_its_neighbours(case, device, monkeypatch):
    """Whatever shares its tile or its call, a sample keeps its bits, in all gradients too."""
    monkeypatch.setattr(_split, "PART_BLOCKS", 1)
    monkeypatch.setattr(_split, "PROGRAMS", 2)
    monkeypatch.setattr(np, "matmul", _matmul_in_order)  # the interpreter's dot
    ranges, heads, heads_k, mine, keys, longest = NEIGHBOURS[case]
    inputs, start, stop = _inputs((ranges, keys.stop, heads, heads_k, 72), torch.float32, device)
    alone = [inputs[0][mine], inputs[1][keys], inputs[2][keys], start[mine] - keys.start, stop[mine] - keys.start]
    grad = torch.randn_like(inputs[0])
    assert op._plan(0, *alone[:2], *longest)[2] == (2 if case == "split" else 1)
    out, lse = op.cross_attention_triton(*inputs, start, stop, *longest, 0.3)
    got = op.cross_attention_bwd_triton(grad, *inputs, out, lse, start, stop, *longest, 0.3, True, True)
    want = op.cross_attention_triton(*alone, *longest, 0.3)
    want_grads = op.cross_attention_bwd_triton(grad[mine], *alone[:3], *want, *alone[3:], *longest, 0.3, True, True)
    pieces = (out[mine], lse[:, mine], got[0][mine], *(t[keys] for t in got[1:]))
    for a, b in zip(pieces, (*want, *want_grads), strict=True):
        assert torch.equal(a, b)


NAN = {  # ranges, rows of q and of the gradient that are NaN, keys that are: what these see, and nothing else, is NaN
    "rows that see nothing, between two samples": ([(0, 10)] * 4 + [(0, 0)] * 3 + [(10, 20)] * 4, range(4, 7), ()),
    "rows that see nothing, within a sample": ([(0, 20)] * 3 + [(20, 20)] + [(0, 20)] * 4, [3], ()),
    "the second sample": ([(0, 10)] * 4 + [(10, 20)] * 4, range(4, 8), ()),
    "the first sample": ([(0, 10)] * 4 + [(10, 20)] * 4, range(4), range(10)),
    "the second of all images so far": ([(0, 10)] * 4 + [(0, 20)] * 4, (), range(10, 20)),
    "rows of the second of all images so far": ([(0, 10)] * 4 + [(0, 20)] * 4, range(4), ()),
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("case", NAN)
def test_nan_goes_only_where_it_is_seen(case, parts, device, monkeypatch):
    """A product of 0 and NaN is NaN: what a row or a key does not see must not even be multiplied for it."""
    monkeypatch.setattr(op, "part_count", lambda *a: parts)
    ranges, bad_rows, bad_keys = NAN[case]
    (q, k, v), start, stop = _inputs((ranges, 20, 1, 1, 8), torch.float32, device)
    grad, bad = torch.randn_like(q), float("nan")
    rows, keys = torch.zeros(len(ranges), dtype=torch.bool), torch.zeros(20, dtype=torch.bool)
    rows[list(bad_rows)], keys[list(bad_keys)] = True, True
    clean = op.cross_attention_triton(q, k, v, start, stop, *PLAIN)
    want = op.cross_attention_bwd_triton(grad, q, k, v, *clean, start, stop, *BOTH)
    for t, where in ((q, rows), (grad, rows), (k, keys), (v, keys)):
        t[where.to(device)] = bad
    sees = (torch.arange(20) >= start.cpu()[:, None]) & (torch.arange(20) < stop.cpu()[:, None])
    rows = (rows & sees.any(1)) | (sees & keys).any(1)  # whose log-sum-exp is NaN
    keys = (sees & rows[:, None]).any(0)
    out = op.cross_attention_triton(q, k, v, start, stop, *PLAIN)
    grads = op.cross_attention_bwd_triton(grad, q, k, v, *out, start, stop, *BOTH)
    for got, was, hit in zip((out[0], *grads), (clean[0], *want), (rows, rows, keys, keys), strict=True):
        assert torch.equal(got.isnan().flatten(1).any(1).cpu(), hit)
        assert torch.equal(got[~hit.to(device)], was[~hit.to(device)])


def _count_launches(monkeypatch, **kernels):
    """Record launches instead of making them."""
    launched = []
    for name, module in kernels.items():
        record = {"__getitem__": lambda self, grid, name=name: lambda *args, **options: launched.append(name)}
        monkeypatch.setattr(module, name, type("Kernel", (), record)())
    return launched


@pytest.mark.parametrize("shape, split", [((3, 64, 64, 8, 8, 64), False), ((2, 1, 6404, 32, 8, 128), True)])
def test_one_launch_forward_two_backward_one_more_for_a_split_and_no_wait(shape, split, monkeypatch):
    """Meta tensors cannot be read: a launcher that waits for the device fails here."""
    images, rows, keys, heads, heads_k, d = shape
    kernels = {"_fwd_kernel": op, "_dq_kernel": op, "_dkv_kernel": op, "_combine_kernel": _split}
    launched = _count_launches(monkeypatch, **kernels)
    q, k = (torch.empty(images * n, h, d, device="meta").bfloat16() for n, h in ((rows, heads), (keys, heads_k)))
    start = torch.empty(images * rows, dtype=torch.int32, device="meta")
    combined = ["_combine_kernel"] * split
    out, lse = op.cross_attention_triton(q, k, k, start, start, rows, keys, 0.1)
    assert launched == ["_fwd_kernel", *combined]
    for query_grad, key_grad in ((True, True), (True, False), (False, True)):
        launched.clear()
        saved = (out, q, k, k, out, lse, start, start, rows, keys, 0.1)
        op.cross_attention_bwd_triton(*saved, query_grad, key_grad)
        assert launched == ["_dq_kernel", *(combined if query_grad else []), *["_dkv_kernel"] * key_grad]


def test_same_result_twice(device, monkeypatch):
    monkeypatch.setattr(_split, "PART_BLOCKS", 1)
    inputs, *ranges = _inputs(([(0, 40)] * 3, 40, 1, 1, 8), torch.float32, device)
    first, second = (op.cross_attention_triton(*inputs, *ranges, *PLAIN) for _ in range(2))
    grads = [op.cross_attention_bwd_triton(first[0], *inputs, *first, *ranges, *BOTH) for _ in range(2)]
    for a, b in zip((*first, *grads[0]), (*second, *grads[1]), strict=True):
        assert torch.equal(a, b)


def test_triton_takes_strided_rows_and_a_stride_0_gradient(device):
    inputs, *ranges = _inputs(([(0, 3)] * 2 + [(3, 5)] * 3, 5, 2, 2, 8), torch.float32, device)
    kv = torch.stack(inputs[1:], 1)  # one projection, keys beside values
    inputs = [inputs[0], *kv.unbind(1)]
    want = op.cross_attention_reference(*inputs, *ranges, *PLAIN)
    for g, w in zip(op.cross_attention_triton(*inputs, *ranges, *PLAIN), want, strict=True):
        torch.testing.assert_close(g, w)
    grad = torch.ones((), device=device).expand(5, 2, 8)
    got = op.cross_attention_bwd_triton(grad, *inputs, *want, *ranges, *BOTH)
    for g, w in zip(got, op.cross_attention_bwd_reference(grad, *inputs, *want, *ranges, *BOTH), strict=True):
        torch.testing.assert_close(g, w, atol=2e-6, rtol=1e-5)


def test_frozen_inputs_cost_no_gradient(device):
    inputs, *ranges = _inputs("overlapping", torch.float32, device)
    saved = (torch.ones_like(inputs[0]), *inputs, *op.cross_attention_reference(*inputs, *ranges, *PLAIN), *ranges)
    full = op.cross_attention_bwd_reference(*saved, *BOTH)
    for function in (op.cross_attention_bwd_reference, op.cross_attention_bwd_triton):
        dq, dk, dv = function(*saved, *PLAIN, True, False)
        assert (dq.shape, dk.numel(), dv.numel()) == (inputs[0].shape, 0, 0)
        torch.testing.assert_close(dq, full[0])
        dq, dk, dv = function(*saved, *PLAIN, False, True)
        assert dq.numel() == 0
        torch.testing.assert_close((dk, dv), full[1:])
    leaves = [inputs[0].cpu().requires_grad_(), *(t.cpu() for t in inputs[1:])]
    cross_attention(*leaves, *(t.cpu() for t in ranges)).sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None


def test_triton_hands_fp64_on(device):
    inputs, *ranges = _inputs("overlapping", torch.float64, device)
    want = op.cross_attention_reference(*inputs, *ranges, *PLAIN)
    got = op.cross_attention_triton(*inputs, *ranges, *PLAIN)
    assert got[1].dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    got = op.cross_attention_bwd_triton(inputs[0], *inputs, *want, *ranges, *BOTH)
    want = op.cross_attention_bwd_reference(inputs[0], *inputs, *want, *ranges, *BOTH)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_opcheck():
    inputs, *ranges = _inputs("latest", torch.float32)
    torch.library.opcheck(
        torch.ops.fastmllm.cross_attention.default, (*[t.requires_grad_() for t in inputs], *ranges, 2, 5, 0.25)
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
    with pytest.raises(ValueError, match="max_seqlen_q -1 and max_seqlen_k None must not be negative"):
        cross_attention(q, k, k, start, start, max_seqlen_q=-1)


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


def _seen(start, stop, keys):
    cols = torch.arange(keys)
    return (cols >= start[:, None]) & (cols < stop[:, None])


def test_media_ranges_of_a_group_are_those_of_mllama():
    """Images whose rows are neighbours are seen together, as the processor of Llama-3.2-Vision lays down."""
    processing = pytest.importorskip("transformers.models.mllama.processing_mllama")
    samples = [[0, 1, 0, 1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 0], [1, 0]]
    sizes = [[2, 1, 3, 2], [1, 2, 1], [], [4]]  # tiles of each image
    tokens = 3  # of a tile
    cu_q = torch.tensor([0, *torch.tensor([len(t) for t in samples]).cumsum(0).tolist()], dtype=torch.int32)
    tiles = torch.tensor([n for sample in sizes for n in sample], dtype=torch.int32)
    cu_k = torch.arange(int(tiles.sum()) + 1, dtype=torch.int32) * tokens
    start, stop = media_ranges(
        torch.tensor([t for sample in samples for t in sample]).bool(), cu_q, cu_k, "latest_group", tiles=tiles
    )
    got, key = _seen(start, stop, int(cu_k[-1])), 0
    for sample, counts, first in zip(samples, sizes, cu_q.tolist(), strict=False):
        spans = processing.get_cross_attention_token_mask(sample, 1)
        for (begin, end), count in zip(spans, counts, strict=True):
            want = torch.zeros(len(sample), dtype=torch.bool)
            want[begin : len(sample) if end == -1 else end] = True
            mine = got[:, key : key + count * tokens]
            assert torch.equal(mine[first : first + len(sample)], want[:, None].expand(-1, count * tokens))
            assert int(mine.sum()) == int(want.sum()) * count * tokens  # no other sample sees it
            key += count * tokens


def test_rows_without_media_see_all_of_their_sample_where_asked():
    is_media = torch.tensor([0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    cu_q, cu_k = torch.tensor([0, 3, 5, 7], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    start, stop = media_ranges(is_media, cu_q, cu_k, empty="all")
    ranges = list(zip(start.tolist(), stop.tolist(), strict=True))
    assert ranges[:3] == [(0, 4)] * 3
    assert all(a >= b for a, b in ranges[3:5])  # a sample of no image
    assert ranges[5:] == [(4, 9)] * 2


@pytest.mark.parametrize("empty", ["all", "zeros"])
@pytest.mark.parametrize("policy", ["latest", "latest_group", "all_previous"])
def test_rows_behind_the_last_sample_see_nothing(policy, empty):
    """Padding at the end of a packed batch is in no sample, whatever rows without media see."""
    is_media = torch.tensor([0, 1, 0, 0, 0], dtype=torch.bool)
    cu_q, cu_k = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    seen = _seen(*media_ranges(is_media, cu_q, cu_k, policy, empty), 4)
    assert seen.any(1).tolist() == [empty == "all", True, True, False, False]


@pytest.mark.parametrize("empty", ["all", "zeros"])
def test_mask_ranges_are_those_of_mllama(empty):
    """The same attention as transformers' mask gives; Meta's code zeroes rows that see no tile."""
    modeling = pytest.importorskip("transformers.models.mllama.modeling_mllama")
    torch.manual_seed(0)
    mask = torch.zeros(2, 5, 2, 3, dtype=torch.int64)
    mask[0, 1:3, 0, :2] = 1  # one image of two tiles, then one of one
    mask[0, 3:, 1, :1] = 1
    mask[1, 2:, 0] = 1
    tokens, heads, d = 4, 2, 8
    start, stop = mask_ranges(mask, tokens, empty)
    q, k, v = torch.randn(10, heads, d), torch.randn(48, heads, d), torch.randn(48, heads, d)
    got = cross_attention(q, k, v, start, stop)
    additive, some = modeling._prepare_cross_attention_mask(mask, tokens, torch.float32)
    q4, k4, v4 = (t.unflatten(0, (2, -1)).transpose(1, 2) for t in (q, k, v))
    want = F.scaled_dot_product_attention(q4, k4, v4, attn_mask=additive)
    want = want * some if empty == "zeros" else want
    torch.testing.assert_close(got, want.transpose(1, 2).flatten(0, 1))


def test_segment_ranges_let_latents_see_their_image():
    cu_q, cu_k = (torch.tensor(t, dtype=torch.int32) for t in ([0, 3, 6, 6, 8], [0, 5, 5, 9, 11]))
    start, stop = segment_ranges(cu_q, cu_k, 9)
    assert start.dtype == stop.dtype == torch.int32
    assert list(zip(start.tolist(), stop.tolist(), strict=True)) == [(0, 5)] * 3 + [(5, 5)] * 3 + [(9, 11)] * 2 + [
        (11, 11)
    ]
    none = torch.zeros(1, dtype=torch.int32)
    assert [t.numel() for t in segment_ranges(none, none, 0)] == [0, 0]


def test_ranges_compile_without_a_graph_break():
    is_media = torch.tensor([0, 1, 1, 0, 1], dtype=torch.bool)
    cu_q, cu_k = torch.tensor([0, 4, 5], dtype=torch.int32), torch.tensor([0, 2, 3, 7], dtype=torch.int32)
    mask = torch.ones(1, 2, 1, 2)

    def ranges():
        return (
            *media_ranges(is_media, cu_q, cu_k, "latest_group", "all"),
            *mask_ranges(mask, 3),
            *segment_ranges(cu_q, cu_q, 5),
        )

    for got, want in zip(torch.compile(ranges, fullgraph=True, backend="aot_eager")(), ranges(), strict=True):
        assert torch.equal(got, want)


def test_ranges_of_meta_tensors_need_no_device():
    """What a GPU would have to wait for raises on meta tensors: no size and no branch depends on values."""
    is_media, cu = torch.ones(5, dtype=torch.bool, device="meta"), torch.ones(3, dtype=torch.int32, device="meta")
    for empty in ("zeros", "all"):
        for policy in ("latest", "latest_group", "all_previous"):
            assert media_ranges(is_media, cu, cu, policy, empty, tiles=cu[:2])[0].shape == (5,)
        assert mask_ranges(torch.ones(2, 3, 1, 2, device="meta"), 4, empty)[1].shape == (6,)
    assert segment_ranges(cu, cu, 7)[0].shape == (7,)


def test_media_ranges_reject_what_does_not_fit():
    is_media, cu = torch.tensor([True, False]), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match='policy \'newest\' must be "latest", "latest_group" or'):
        media_ranges(is_media, cu, cu, "newest")
    with pytest.raises(ValueError, match=r"is_media \(2,\) torch.int64"):
        media_ranges(is_media.long(), cu, cu)
    with pytest.raises(ValueError, match=r"marks 1 rows, but cu_seqlens_k \(3,\) bounds 2 images"):
        media_ranges(is_media, cu, torch.tensor([0, 1, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match='empty \'mean\' must be "zeros" or "all"'):
        media_ranges(is_media, cu, cu, empty="mean")
    with pytest.raises(ValueError, match=r"tiles \(1,\) sum to 2, but cu_seqlens_k \(2,\) bounds 1"):
        media_ranges(is_media, cu, cu, tiles=torch.tensor([2]))
    with pytest.raises(ValueError, match=r"segment_ranges: cu_seqlens_q \(2,\) and cu_seqlens_k \(1,\)"):
        segment_ranges(cu, cu[:1], 2)
    with pytest.raises(ValueError, match=r"mask_ranges: mask \(1, 2, 3\) must be"):
        mask_ranges(torch.zeros(1, 2, 3), 4)
    with pytest.raises(ValueError, match=r"mask \(1, 1, 1, 3\) sees tiles that are not neighbours"):
        mask_ranges(torch.tensor([[[[1, 0, 1]]]]), 4)
