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
