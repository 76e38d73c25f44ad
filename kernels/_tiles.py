"""Device functions that the attention kernels share: tiles of rows, the running softmax, log-sum-exp."""

from __future__ import annotations

from ._triton import dot, tl, triton


@triton.jit
def load_tile(ptr, rows, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Load rows of one head, (len(rows), BLOCK_D): zeros behind the head dimension and, if MASKED, behind the end."""
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED and BLOCK_D > D:
        return tl.load(ptrs, mask=(rows < length)[:, None] & (d < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(ptrs, mask=(rows < length)[:, None], other=0.0)
    if BLOCK_D > D:
        return tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def store_tile(ptr, tile, rows, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Round and store rows of one head."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (d < D)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + d[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_lse(ptr, rows, length):
    """Load log-sum-exp, in powers of two; a row that saw nothing gets +inf, so that its p is 0."""
    lse = tl.load(ptr + rows, mask=rows < length, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)


@triton.jit
def softmax_step(acc, peak, total, s, v):
    """Take the scores `s` (in powers of two, -inf where unseen) and their values into the running softmax."""
    new_peak = tl.maximum(peak, tl.max(s, 1))
    anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row may have seen nothing yet
    p = tl.exp2(s - anchor[:, None])
    keep = tl.exp2(peak - anchor)
    return dot(p.to(v.dtype), v, acc * keep[:, None]), new_peak, total * keep + tl.sum(p, 1)


@triton.jit
def softmax_end(acc, peak, total):
    """Return the output and the natural log-sum-exp; zeros and -inf for rows that saw nothing."""
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    return acc / total[:, None], tl.where(blind, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)


@triton.jit
def locate(cu_q_ptr, cu_k_ptr, segments, blocks, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first row of this program's block, its head, and where its segment lies; behind the last: nowhere."""
    program = tl.program_id(0)
    pair = program // blocks
    segment = tl.minimum(pair // HEADS, segments)
    after = tl.minimum(segment + 1, segments)
    start_q = tl.load(cu_q_ptr + segment).to(tl.int64)
    start_k = tl.load(cu_k_ptr + segment).to(tl.int64)
    len_q = (tl.load(cu_q_ptr + after) - start_q).to(tl.int32)
    len_k = (tl.load(cu_k_ptr + after) - start_k).to(tl.int32)
    return (program % blocks) * BLOCK, (pair % HEADS).to(tl.int64), start_q, start_k, len_q, len_k


@triton.jit
def clear_behind(
    ptr, lse_ptr, cu_ptr, segments, total, blocks,
    HAS_LSE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write zeros, and -inf as log-sum-exp, to the rows behind the last segment: the work of the last programs."""
    mine = tl.program_id(0) - segments * HEADS * blocks
    if mine >= 0:
        end = tl.load(cu_ptr + segments)
        for start in range(end + mine * BLOCK, total, blocks * BLOCK):
            rows = start + tl.arange(0, BLOCK)
            for h in range(HEADS):
                zeros = tl.zeros((BLOCK, BLOCK_D), tl.float32)
                store_tile(ptr + h * D, zeros, rows, total, HEADS * D, D, BLOCK_D)
            if HAS_LSE:
                at = lse_ptr + rows
                for _ in range(HEADS):
                    tl.store(at, tl.full((BLOCK,), float("-inf"), tl.float32), mask=rows < total)
                    at += total
