"""Attention that each key receives, from q, k and the log-sum-exp of a flash-style forward: no (T, N) memory.

P[i, j] = exp(scale q_i k_j + bias_j - lse_i) needs one product more, for the one layer and the rows that are asked for.
Shapes as in `attention`: T query rows of S segments, N keys, H query heads, Hkv key heads, D head dimension.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ._dense import rows_contiguous
from ._tiles import load_lse, load_tile, locate
from ._triton import accumulator_dtype, cdiv, device_of, dot, next_power_of_2, tl, triton

MAX_HEAD_DIM = 256
CHUNK = 1 << 19  # probabilities that the reference holds at a time: 2 MiB


# 1. reference ---------------------------------------------------------------------------------------------------------
def attention_scores_reference(
    q: Tensor, k: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int, causal: bool,
    softmax_scale: float, reduce: str, row_start: Tensor | None, row_stop: Tensor | None, row_weight: Tensor | None,
    key_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    acc = accumulator_dtype(q.dtype)
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    out = q.new_zeros(k.shape[0], dtype=acc)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    starts = ends_q[:-1] if row_start is None else row_start.tolist()
    stops = ends_q[1:] if row_stop is None else row_stop.tolist()
    longest = max((b - a for a, b in itertools.pairwise(ends_k)), default=0)
    fit = ends_q[-1] <= q.shape[0] and ends_k[-1] <= k.shape[0] and longest <= max_seqlen_k
    if not fit or any(ends[0] or ends != sorted(ends) for ends in (ends_q, ends_k)):
        raise ValueError(
            f"fastmllm::attention_scores: cu_seqlens must ascend from 0, and end at {ends_q[-1]}, {ends_k[-1]} with up "
            f"to {longest} keys, but q and k have {q.shape[0]}, {k.shape[0]} rows and max_seqlen_k is {max_seqlen_k}"
        )
    for a, b, c, d, start, stop in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], starts, stops, strict=False):
        start, stop = max(start, a), min(stop, b)
        if start >= stop or c >= d:
            continue
        keys = k[c:d].to(acc).permute(1, 2, 0)  # (Hkv, D, keys)
        received = keys.new_zeros((q.shape[1], d - c))
        step = min(max(CHUNK // (group * (d - c)), 8), stop - start)
        together = max(CHUNK // (group * (d - c) * step), 1)  # key heads
        for first, head in itertools.product(range(start, stop, step), range(0, heads, together)):
            rows, of = slice(first, min(first + step, stop)), slice(head * group, (head + together) * group)
            blind = lse[of, rows].isinf()
            added = -lse[of, rows].masked_fill(blind, torch.inf)  # (h, rows): a row that sees no key adds 0
            one = q[rows, of].to(acc).transpose(0, 1).reshape(-1, group * added.shape[1], q.shape[2])
            p = torch.baddbmm(added.view(len(one), -1, 1), one, keys[head : head + together], alpha=softmax_scale)
            p = p.view(*added.shape, d - c)
            p = (p if key_bias is None else p.add_(key_bias[c:d])).exp_()
            if causal:
                p.tril_(first - a + (d - c) - (b - a))
            received[of] += p.sum(1) if row_weight is None else row_weight[rows].to(acc) @ p
        if row_weight is None:
            received /= stop - start
        out[c:d] = getattr(received, "amax" if reduce == "max" else reduce)(0)
    return out


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
# One program owns one block of keys of one query head and walks the rows that are asked for, so nothing is atomic. The
# heads are reduced afterwards: (H, N) numbers.
@triton.jit(do_not_specialize=["T", "N", "segments", "blocks"])
def _scores_kernel(
    q_ptr, k_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, start_ptr, stop_ptr, weight_ptr, bias_ptr, out_ptr,
    T, N, segments, blocks, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, head, start_q, start_k, len_q, len_k = locate(cu_q_ptr, cu_k_ptr, segments, blocks, HEADS, BLOCK_N)
    if first < len_k:
        cols = first + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr + start_k * K_ROW + head // GROUP * K_HEAD, cols, len_k, K_ROW, D, BLOCK_D, True)
        begin, end = 0, len_q
        if HAS_ROWS:
            segment = tl.program_id(0) // blocks // HEADS
            begin = tl.maximum((tl.load(start_ptr + segment) - start_q).to(tl.int32), 0)
            end = tl.minimum((tl.load(stop_ptr + segment) - start_q).to(tl.int32), len_q)
        chosen = tl.maximum(end - begin, 1)
        shift = len_k - len_q
        if CAUSAL:
            begin = tl.maximum(begin, first - shift)  # rows above see none of these keys
        scale2 = scale * 1.4426950408889634
        q_ptr += start_q * Q_ROW + head * Q_HEAD
        lse_ptr += head * T + start_q
        if HAS_BIAS:
            bias = tl.load(bias_ptr + start_k + cols, mask=cols < len_k, other=0.0) * 1.4426950408889634
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        received = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(begin, end, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            near = tl.minimum(rows, end - 1)  # rows behind the end have p = 0, whatever they repeat
            q = load_tile(q_ptr, near, len_q, Q_ROW, D, BLOCK_D, False)
            lse = load_lse(lse_ptr, rows, end)
            s = dot(k, tl.trans(q), zeros) * scale2 - lse[None, :]
            if HAS_BIAS:
                s += bias[:, None]
            if CAUSAL:
                s = tl.where(cols[:, None] <= rows[None, :] + shift, s, float("-inf"))
            p = tl.exp2(s)
            if HAS_WEIGHT:
                p *= tl.load(weight_ptr + start_q + near)[None, :]
            received += p
        total = tl.sum(received, 1)
        if not HAS_WEIGHT:
            total = total / chosen.to(tl.float32)
        tl.store(out_ptr + head * N + start_k + cols, total, mask=cols < len_k)
    mine = tl.program_id(0) - segments * HEADS * blocks
    if mine >= 0:  # keys behind the last segment: the work of the last programs
        last = tl.load(cu_k_ptr + segments)
        for start in range(last + mine * BLOCK_N, N, blocks * BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            at = out_ptr + cols
            for _ in range(HEADS):
                tl.store(at, tl.zeros((BLOCK_N,), tl.float32), mask=cols < N)
                at += N


# 3. launchers ---------------------------------------------------------------------------------------------------------
# Head dimension, padded -> (BLOCK_M, BLOCK_N, num_warps, num_stages) in 16 bits, and in fp32, which has no tensor cores
# here; these do not spill.
_TILES = {
    16: (64, 64, 4, 3),
    32: (64, 64, 4, 3),
    64: (64, 64, 4, 3),
    128: (64, 64, 4, 2),
    256: (32, 64, 4, 2),
}
_FP32_TILES = {
    16: (32, 32, 4, 1),
    32: (32, 32, 4, 1),
    64: (32, 32, 4, 1),
    128: (32, 32, 8, 1),
    256: (16, 32, 8, 1),
}


def _config(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    block_d = max(16, next_power_of_2(head_dim))
    m, n, warps, stages = (_FP32_TILES if dtype == torch.float32 else _TILES)[block_d]
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


def attention_scores_triton(
    q: Tensor, k: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int, causal: bool,
    softmax_scale: float, reduce: str, row_start: Tensor | None, row_stop: Tensor | None, row_weight: Tensor | None,
    key_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    if q.dtype == torch.float64:
        return attention_scores_reference(
            q, k, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, causal, softmax_scale, reduce, row_start, row_stop,
            row_weight, key_bias,
        )  # fmt: skip
    q, k = rows_contiguous(q), rows_contiguous(k)
    (total, heads, d), keys, segments = q.shape, k.shape[0], cu_seqlens_q.numel() - 1
    received = q.new_empty((heads, keys), dtype=torch.float32)
    config = _config(d, q.dtype)
    blocks = max(cdiv(max_seqlen_k, config["BLOCK_N"]), 1)
    optional = [None if t is None else t.contiguous() for t in (row_start, row_stop, row_weight, key_bias)]
    if keys:
        with device_of(q):
            _scores_kernel[(blocks * (segments * heads + 1),)](
                q, k, lse.contiguous(), cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), *optional, received,
                total, keys, segments, blocks, softmax_scale,
                Q_ROW=q.stride(0), Q_HEAD=q.stride(1), K_ROW=k.stride(0), K_HEAD=k.stride(1), HEADS=heads,
                GROUP=heads // k.shape[1], D=d, CAUSAL=causal, HAS_ROWS=row_start is not None,
                HAS_WEIGHT=row_weight is not None, HAS_BIAS=key_bias is not None, **config,
            )  # fmt: skip
    return getattr(received, "amax" if reduce == "max" else reduce)(0)


# 4. operator ----------------------------------------------------------------------------------------------------------
_attention_scores = torch.library.custom_op(
    "fastmllm::attention_scores",
    attention_scores_reference,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_k,"
    " bool causal, float softmax_scale, str reduce, Tensor? row_start, Tensor? row_stop, Tensor? row_weight,"
    " Tensor? key_bias) -> Tensor",
)
_attention_scores.register_kernel("cuda")(attention_scores_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_attention_scores.register_fake
def _(
    q, k, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, causal, softmax_scale, reduce, row_start, row_stop,
    row_weight, key_bias,
):  # fmt: skip
    return q.new_empty(k.shape[0], dtype=accumulator_dtype(q.dtype))


# 6. autograd ----------------------------------------------------------------------------------------------------------
# Scores choose tokens, and a choice has no gradient: every published selector detaches them.
def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


def _backward(ctx, _grad):
    return (None,) * 13


_attention_scores.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def attention_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    reduce: str = "mean",
    rows: str | tuple[Tensor, Tensor] = "all",
    row_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Return the attention that each key receives from chosen query rows of its segment.

    Args:
        q: (T, H, D) queries of the layer, as its attention took them; rows of one head may be strided.
        k: (N, Hkv, D) keys; Hkv divides H.
        lse: (H, T) natural log-sum-exp of that attention (`attention(..., return_lse=True)`): fp32, or fp64 with fp64
            q. With other queries or keys than its own, e.g. before RoPE, the scores are no probabilities.
        cu_seqlens_q: (S + 1,) int32 boundaries of the segments in `q`. Rows behind the last one are never read.
        cu_seqlens_k: (S + 1,) int32 boundaries in `k`; None when they are those of `q`.
        max_seqlen_k: keys of the longest segment, or an upper bound. None reads it off `cu_seqlens_k`, which makes the
            host wait for the device.
        causal: as in that attention: bottom-right aligned.
        softmax_scale: as in that attention; None for D ** -0.5.
        reduce: "mean", "sum" or "max" over the query heads.
        rows: whose attention counts: "all" rows of the segment, its "first" (CLS) or its "last" one, or a pair of
            (S,) int32 tensors: the first packed row of each segment and the one behind the last (e.g. its text).
            A segment without chosen rows gives zeros. The work is in proportion to the rows.
        row_weight: (T,) fp32 (fp64 with fp64): the result is the sum of the chosen rows, each times its weight: ones
            for sums, zeros and ones for a mask. None for the mean of the chosen rows.
        key_bias: (N,) as in that attention.

    Returns:
        (N,) fp32 (fp64 for fp64), without gradient; rows are averaged before `reduce`. Keys behind the last segment
        get zeros.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a choice has no such name.

    What FastV (rows="last"), VisionZip and FasterVLM (rows="first"; reduce="sum", "mean"), their ports to towers
    without CLS (rows="all") and SparseVLM (a range of text rows, row_weight for its raters) read from eager attention.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    _check(q, k, lse, cu_seqlens_q, cu_seqlens_k, reduce, rows, row_weight, key_bias)
    if max_seqlen_k is None:
        max_seqlen_k = int(cu_seqlens_k.diff().max()) if cu_seqlens_k.numel() > 1 else 0
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    start = stop = None
    if rows == "first":
        start, stop = cu_seqlens_q[:-1], cu_seqlens_q[:-1] + 1
    elif rows == "last":
        start, stop = cu_seqlens_q[1:] - 1, cu_seqlens_q[1:]
    elif not isinstance(rows, str):
        start, stop = rows
    q, k, lse = q.detach(), k.detach(), lse.detach()
    return _attention_scores(
        q, k, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, causal, softmax_scale, reduce, start, stop, row_weight,
        key_bias,
    )  # fmt: skip


def _check(q, k, lse, cu_seqlens_q, cu_seqlens_k, reduce, rows, row_weight, key_bias) -> None:
    op = "fastmllm::attention_scores"
    if q.dim() != 3 or k.dim() != 3 or q.shape[2] != k.shape[2] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: q {tuple(q.shape)} and k {tuple(k.shape)} must be (T, H, D) and (N, Hkv, D) with Hkv "
                         "dividing H")  # fmt: skip
    if not 0 < q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head dimension {q.shape[2]} of q {tuple(q.shape)} is not 1 to {MAX_HEAD_DIM}")
    if not q.is_floating_point() or q.dtype != k.dtype:
        raise ValueError(f"{op}: q {q.dtype} and k {k.dtype} must be one floating dtype")
    segments = cu_seqlens_q.numel() - 1
    ranges = {} if isinstance(rows, str) else {"rows[0]": rows[0], "rows[1]": rows[1]}
    acc = accumulator_dtype(q.dtype)
    expected = {
        "lse": (lse, (q.shape[1], q.shape[0]), acc),
        "cu_seqlens_q": (cu_seqlens_q, (max(segments, 0) + 1,), torch.int32),
        "cu_seqlens_k": (cu_seqlens_k, (segments + 1,), torch.int32),
        **{name: (t, (segments,), torch.int32) for name, t in ranges.items()},
        "row_weight": (row_weight, q.shape[:1], acc),
        "key_bias": (key_bias, k.shape[:1], acc),
    }
    for name, (t, shape, dtype) in expected.items():
        if t is not None and (t.shape != shape or t.dtype != dtype or t.device != q.device):
            raise ValueError(f"{op}: {name} {tuple(t.shape)} {t.dtype} on {t.device} must be {tuple(shape)} {dtype} on "
                             f"{q.device}, for q {tuple(q.shape)} and k {tuple(k.shape)}")  # fmt: skip
    if reduce not in ("mean", "sum", "max"):
        raise ValueError(f'{op}: reduce {reduce!r} must be "mean", "sum" or "max"')
    if isinstance(rows, str) and rows not in ("all", "first", "last"):
        raise ValueError(f'{op}: rows {rows!r} must be "all", "first", "last" or a pair of tensors')
