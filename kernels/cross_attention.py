"""Cross-attention from text or latent rows to media tokens: each row sees one range of keys (Flamingo, 2204.14198).

Shapes: T query rows, N media tokens of all images packed, H query heads, Hkv key/value heads (Hkv divides H), D head
dimension. Row t sees the keys media_start[t] to media_stop[t] - 1 of the packed N; an empty range gives zeros, as in
OpenFlamingo and Idefics. Where a model lets rows without media see something, the range says so (`empty="all"`).
"""

from __future__ import annotations

import math
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ._dense import dense_bwd, dense_fwd, rows_contiguous
from ._ranges import mask_ranges, media_ranges, segment_ranges
from ._split import combine, part_count
from ._tiles import load_lse, load_tile, softmax_end, softmax_step, store_tile
from ._triton import accumulator_dtype, cdiv, device_of, dot, next_power_of_2, tl, triton
from ._watch import report

__all__ = ["cross_attention", "mask_ranges", "media_ranges", "segment_ranges"]

MAX_HEAD_DIM = 128
SCAN = 1024  # rows whose ranges the kernel of dk and dv looks at in one step


# 1. reference ---------------------------------------------------------------------------------------------------------
class _Piece(NamedTuple):
    """Neighbouring images of one size, each with as many neighbouring rows that see just that image: one dense call."""

    rows: slice
    keys: slice
    images: int

    def queries(self, t: Tensor) -> Tensor:
        return t[self.rows].unflatten(0, (self.images, -1)).transpose(1, 2)  # (B, H, L, D)

    def others(self, t: Tensor) -> Tensor:
        return t[self.keys].unflatten(0, (self.images, -1)).transpose(1, 2)

    def row_stats(self, t: Tensor) -> Tensor:
        return t[:, self.rows].unflatten(1, (self.images, -1)).transpose(0, 1)

    def takes(self, rows: slice, keys: slice) -> bool:
        length, width = ((s.stop - s.start) // self.images for s in (self.rows, self.keys))
        next_to = self.rows.stop == rows.start and self.keys.stop == keys.start
        return next_to and length == rows.stop - rows.start and width == keys.stop - keys.start


def _pieces(media_start: Tensor, media_stop: Tensor, num_keys: int) -> list[_Piece]:
    """Return which rows see which keys, in dense calls without a mask.

    With one range an image that skips all keys of other images; a mask of (T, N) would compute them.
    """
    pieces: list[_Piece] = []
    row = 0
    ranges = zip(media_start.clamp(min=0).tolist(), media_stop.clamp(max=num_keys).tolist(), strict=True)
    for (low, high), same in groupby(ranges):
        rows, keys = slice(row, row + sum(1 for _ in same)), slice(low, high)
        row = rows.stop
        if low >= high:
            continue
        if pieces and pieces[-1].takes(rows, keys):
            first = pieces.pop()
            rows, keys = slice(first.rows.start, row), slice(first.keys.start, high)
            pieces.append(_Piece(rows, keys, first.images + 1))
        else:
            pieces.append(_Piece(rows, keys, 1))
    return pieces


def cross_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, media_start: Tensor, media_stop: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=accumulator_dtype(q.dtype))
    for piece in _pieces(media_start, media_stop, k.shape[0]):
        o, one = dense_fwd(piece.queries(q), piece.others(k), piece.others(v), False, None, softmax_scale)
        piece.queries(out).copy_(o)
        piece.row_stats(lse).copy_(one)
    return out, lse


def cross_attention_bwd_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, media_start: Tensor, media_stop: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, query_grad: bool, key_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, grad, out = (rows_contiguous(t) for t in (q, k, v, grad, out))
    pieces = _pieces(media_start, media_stop, k.shape[0])
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    shared = any(a.keys.stop > b.keys.start for a, b in pairwise(pieces))  # several pieces see one key: sum in fp32
    dtype = accumulator_dtype(k.dtype) if shared else k.dtype
    dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
    for piece in pieces:
        dense = (piece.queries(grad), piece.queries(q), piece.others(k), piece.others(v), piece.queries(out))
        grads = dense_bwd(*dense, piece.row_stats(lse), False, None, softmax_scale)
        piece.queries(dq).copy_(grads[0])
        for total, part in zip((dk, dv), grads[1:], strict=True):
            piece.others(total).add_(part) if shared else piece.others(total).copy_(part)
    dk, dv = (dk.to(k.dtype), dv.to(v.dtype)) if key_grad else (k.new_empty(0), v.new_empty(0))
    return dq if query_grad else q.new_empty(0), dk, dv


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
# One program owns one tile of rows of PACK heads that share their keys, and walks the tile's different ranges one after
# the other: a row's result has the bits of its own range alone, whoever shares its tile, and NaN stays where it is seen
# (0 * NaN is NaN, so what a row does not see is never multiplied for it). The kernel of dk and dv does so with the runs
# of keys that the same rows see. `scale2` is the scale times log2(e).
@triton.jit
def _ranges(start_ptr, stop_ptr, rows, T, N):
    """Return the keys of each row; an empty range is (N, 0), so that minima and maxima pass over it."""
    low = tl.maximum(tl.load(start_ptr + rows, mask=rows < T, other=0), 0)
    high = tl.minimum(tl.load(stop_ptr + rows, mask=rows < T, other=0), N)
    empty = low >= high
    return tl.where(empty, N, low), tl.where(empty, 0, high)


@triton.jit
def _pairs(start_ptr, stop_ptr, rows, T, N):
    """Return each row's range as one number, by which ranges have an order."""
    low, high = _ranges(start_ptr, stop_ptr, rows, T, N)
    return (low.to(tl.int64) << 32) + high


@triton.jit
def _next(pairs, now):
    """Return the least range that is greater than `now`; behind the last one 2^63 - 1."""
    return tl.min(tl.where(pairs > now, pairs, 9223372036854775807), 0)


@triton.jit
def _own(parts, HEADS: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the rows and heads of a program's tile, its first head, and which part of the keys is its."""
    program = tl.program_id(0)
    first = (program % (HEADS // PACK) * PACK).to(tl.int64)
    block = program // (HEADS // PACK)
    item = tl.arange(0, BLOCK_M)
    return block // parts * (BLOCK_M // PACK) + item // PACK, first + item % PACK, first, block % parts


@triton.jit
def _share(pair, part, parts, BLOCK_N: tl.constexpr):
    """Return where a part of the keys of a range begins, where its last, partial block starts, and where it ends."""
    first = (pair >> 32).to(tl.int32)
    stop = pair.to(tl.int32)  # the lower half
    length = tl.cdiv(tl.cdiv(tl.maximum(stop - first, 0), BLOCK_N), parts) * BLOCK_N
    begin = first + part * length
    end = tl.minimum(stop, begin + length)
    return begin, begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N, end


@triton.jit
def _load(ptr, offsets, rows, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = (rows < T)[:, None] & (d < D)[None, :] if BLOCK_D > D else (rows < T)[:, None]
    return tl.load(ptr + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, tile, offsets, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offsets[:, None] + d[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def _scores(q, k, cols, end, scale2, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    s = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32)) * scale2
    if MASKED:
        s = tl.where((cols < end)[None, :], s, float("-inf"))
    return s


@triton.jit(do_not_specialize=["T", "N", "parts"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, out_ptr, lse_ptr, T, N, parts, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Give out and log-sum-exp of one part of the keys; there is only one unless queries are few."""
    rows, heads, head, part = _own(parts, HEADS, PACK, BLOCK_M)
    wide = rows.to(tl.int64)
    q = _load(q_ptr, wide * Q_ROW + heads * Q_HEAD, rows, T, D, BLOCK_D)
    k_ptr += head // GROUP * K_HEAD
    v_ptr += head // GROUP * V_HEAD
    out_ptr += part.to(tl.int64) * T * (HEADS * D)
    lse_ptr += part.to(tl.int64) * T * HEADS
    pairs = _pairs(start_ptr, stop_ptr, rows, T, N)
    pair = _next(pairs, -1)
    while pair < 9223372036854775807:
        begin, masked, end = _share(pair, part, parts, BLOCK_N)
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for TAIL in tl.static_range(2):
            for start in range(masked if TAIL else begin, end if TAIL else masked, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                k = load_tile(k_ptr, cols, end, K_ROW, D, BLOCK_D, TAIL == 1)
                s = _scores(q, k, cols, end, scale * 1.4426950408889634, TAIL == 1, BLOCK_N)
                v = load_tile(v_ptr, cols, end, V_ROW, D, BLOCK_D, TAIL == 1)
                acc, peak, total = softmax_step(acc, peak, total, s, v)
        out, lse = softmax_end(acc, peak, total)
        pairs = _pairs(start_ptr, stop_ptr, rows, T, N)  # again, not held in registers meanwhile
        mine = (pairs == pair) & (rows < T)
        _store(out_ptr, out, wide * (HEADS * D) + heads * D, mine, D, BLOCK_D)
        tl.store(lse_ptr + heads * T + rows, lse, mask=mine)
        pair = _next(pairs, pair)


@triton.jit(do_not_specialize=["T", "N", "parts"])
def _dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, out_ptr, lse_ptr, lse2_ptr, delta_ptr, dq_ptr, T, N, parts, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr,
    QUERY_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Give a part of dq, and for the kernel of dk and dv delta = sum(do * out) and log-sum-exp in powers of two."""
    rows, heads, head, part = _own(parts, HEADS, PACK, BLOCK_M)
    wide = rows.to(tl.int64)
    packed = wide * (HEADS * D) + heads * D
    do = _load(do_ptr, packed, rows, T, D, BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * _load(out_ptr, packed, rows, T, D, BLOCK_D).to(tl.float32), 1)
    lse = load_lse(lse_ptr + heads * T, rows, T)
    once = rows < tl.where(part == 0, T, 0)
    tl.store(delta_ptr + heads * T + rows, delta, mask=once)
    tl.store(lse2_ptr + heads * T + rows, lse, mask=once)
    if QUERY_GRAD:
        q = _load(q_ptr, wide * Q_ROW + heads * Q_HEAD, rows, T, D, BLOCK_D)
        k_ptr += head // GROUP * K_HEAD
        v_ptr += head // GROUP * V_HEAD
        dq_ptr += part.to(tl.int64) * T * (HEADS * D)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        pairs = _pairs(start_ptr, stop_ptr, rows, T, N)
        pair = _next(pairs, -1)
        while pair < 9223372036854775807:
            begin, masked, end = _share(pair, part, parts, BLOCK_N)
            dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for TAIL in tl.static_range(2):
                for start in range(masked if TAIL else begin, end if TAIL else masked, BLOCK_N):
                    cols = start + tl.arange(0, BLOCK_N)
                    k = load_tile(k_ptr, cols, end, K_ROW, D, BLOCK_D, TAIL == 1)
                    v = load_tile(v_ptr, cols, end, V_ROW, D, BLOCK_D, TAIL == 1)
                    s = _scores(q, k, cols, end, scale * 1.4426950408889634, TAIL == 1, BLOCK_N)
                    ds = tl.exp2(s - lse[:, None]) * (dot(do, tl.trans(v), zeros) - delta[:, None])
                    dq = dot(ds.to(k.dtype), k, dq)
            pairs = _pairs(start_ptr, stop_ptr, rows, T, N)
            _store(dq_ptr, dq * scale, packed, (pairs == pair) & (rows < T), D, BLOCK_D)
            pair = _next(pairs, pair)


@triton.jit(do_not_specialize=["T", "N"])
def _dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, T, N, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCAN_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Give dk and dv of one block of keys, run by run of keys that the same rows see, so nothing is atomic.

    A run's rows are walked from the first that sees it: its keys' gradients have the bits of their own rows alone.
    """
    head = (tl.program_id(0) % (HEADS // GROUP)).to(tl.int64)
    first = tl.program_id(0) // (HEADS // GROUP) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    last = tl.minimum(first + BLOCK_N, N)
    zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    stride = HEADS // GROUP * D
    at = first
    while at < last:
        edge = tl.full((SCAN_ROWS,), 2147483647, tl.int32)
        earliest = tl.full((SCAN_ROWS,), 2147483647, tl.int32)
        latest = tl.zeros((SCAN_ROWS,), tl.int32)
        for start in range(0, T, SCAN_ROWS):
            rows = start + tl.arange(0, SCAN_ROWS)
            low, high = _ranges(start_ptr, stop_ptr, rows, T, N)
            sees = (low <= at) & (high > at)
            edge = tl.minimum(edge, tl.where(low > at, low, tl.where(sees, high, 2147483647)))
            earliest = tl.minimum(earliest, tl.where(sees, rows, 2147483647))
            latest = tl.maximum(latest, tl.where(sees, rows + 1, 0))
        stop = tl.minimum(tl.min(edge, 0), last)
        end = tl.max(latest, 0)
        begin = tl.minimum(tl.min(earliest, 0), end)
        k = load_tile(k_ptr + head * K_HEAD, cols, N, K_ROW, D, BLOCK_D, True)
        v = load_tile(v_ptr + head * V_HEAD, cols, N, V_ROW, D, BLOCK_D, True)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for h in range(GROUP):
            one = head * GROUP + h
            for start in range(begin, end, BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)
                low, high = _ranges(start_ptr, stop_ptr, rows, T, N)
                rows = tl.where((low <= at) & (high > at), rows, T)  # a row that does not see it is read as zeros
                q = load_tile(q_ptr + one * Q_HEAD, rows, T, Q_ROW, D, BLOCK_D, True)
                do = load_tile(do_ptr + one * D, rows, T, HEADS * D, D, BLOCK_D, True)
                lse = tl.load(lse2_ptr + one * T + rows, mask=rows < T, other=float("inf"))  # and has p = 0
                delta = tl.load(delta_ptr + one * T + rows, mask=rows < T, other=0.0)
                s = dot(k, tl.trans(q), zeros) * (scale * 1.4426950408889634) - lse[None, :]  # (BLOCK_N, BLOCK_M)
                p = tl.exp2(s)
                dv = dot(p.to(do.dtype), do, dv)
                ds = p * (dot(v, tl.trans(do), zeros) - delta[None, :])
                dk = dot(ds.to(q.dtype), q, dk)
        run = tl.where((cols >= at) & (cols < stop), cols, N)
        store_tile(dk_ptr + head * D, dk * scale, run, N, stride, D, BLOCK_D)
        store_tile(dv_ptr + head * D, dv, run, N, stride, D, BLOCK_D)
        at = stop


# 3. launchers ---------------------------------------------------------------------------------------------------------
# Head dimension, padded -> (BLOCK_M, BLOCK_N, num_warps, num_stages) of forward, dq, and dk with dv, in 16 bits. These
# do not spill on sm_80, sm_90, sm_100 and gfx942.
_TILES = {
    16: ((128, 32, 4, 3), (64, 64, 8, 2), (32, 64, 8, 2)),
    32: ((128, 32, 4, 3), (64, 64, 8, 2), (32, 64, 8, 2)),
    64: ((128, 64, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
    128: ((64, 64, 8, 2), (64, 32, 8, 2), (16, 64, 8, 2)),
}
_FP32_TILES = {  # no tensor cores here
    False: ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    True: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1)),
}


def _config(kind: int, dtype: torch.dtype, head_dim: int, group: int, rows: int) -> dict[str, int]:
    """Return the tile of the forward (0), dq (1) or dk and dv (2) kernel, where at most `rows` rows share a range.

    Few of them get a low tile, which holds several heads of a group, so that their keys are read once.
    """
    block_d = max(16, next_power_of_2(head_dim))
    m, n, warps, stages = _FP32_TILES[block_d > 64][kind] if dtype == torch.float32 else _TILES[block_d][kind]
    config = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}
    if kind == 2:
        return config
    pack = group & -group if rows < m else 1  # the largest power of two that divides the group
    pack = min(pack, m)
    return {**config, "BLOCK_M": min(m, max(16, next_power_of_2(rows * pack))), "PACK": pack}


def _plan(kind: int, q: Tensor, k: Tensor, rows: int, keys: int) -> tuple[dict[str, int], int, int]:
    """Return the configuration, how many tiles of rows and heads there are, and into how many parts the keys go.

    Tile and parts follow the longest range and who shares it; not T or N, where the host says the former.
    """
    total, heads, d = q.shape
    rows, keys, group = rows or total, keys or k.shape[0], heads // k.shape[1]
    config = _config(kind, q.dtype, d, group, rows)
    one, tiles = (cdiv(n * config["PACK"], config["BLOCK_M"]) * (heads // config["PACK"]) for n in (rows, total))
    return config, tiles, part_count(one, keys, config["BLOCK_N"], rows * group)


def _constants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Return what a model fixes; strides among it, so that the compiler sees how wide it may load."""
    names = ("Q_ROW", "Q_HEAD", "K_ROW", "K_HEAD", "V_ROW", "V_HEAD")
    strides = dict(zip(names, (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]), strict=True))
    return {**strides, "HEADS": q.shape[1], "GROUP": q.shape[1] // k.shape[1], "D": q.shape[2]}


def _prepare(q: Tensor, k: Tensor, v: Tensor, media_start: Tensor, media_stop: Tensor) -> tuple[Tensor, ...]:
    return (*(rows_contiguous(t) for t in (q, k, v)), media_start.contiguous(), media_stop.contiguous())


def cross_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, media_start: Tensor, media_stop: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.dtype == torch.float64:
        return cross_attention_reference(q, k, v, media_start, media_stop, max_seqlen_q, max_seqlen_k, softmax_scale)
    q, k, v, *ranges = _prepare(q, k, v, media_start, media_stop)
    total, heads, d = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((heads, total), dtype=torch.float32)
    if total:
        config, tiles, parts = _plan(0, q, k, max_seqlen_q, max_seqlen_k)
        targets = (out, lse)
        if parts > 1:
            targets = (q.new_empty((parts, total, heads, d), dtype=torch.float32), lse.new_empty((parts, heads, total)))
        with device_of(q):
            _fwd_kernel[(tiles * parts,)](
                q, k, v, *ranges, *targets, total, k.shape[0], parts, softmax_scale, **_constants(q, k, v), **config
            )
            if parts > 1:
                combine(*targets, out, lse)
    return out, lse


def _empty_grads(q: Tensor, k: Tensor, v: Tensor, query_grad: bool, key_grad: bool) -> tuple[Tensor, ...]:
    wanted = ((q, query_grad), (k, key_grad), (v, key_grad))
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else t.new_empty(0) for t, want in wanted
    )


def cross_attention_bwd_triton(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, media_start: Tensor, media_stop: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, query_grad: bool, key_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if q.dtype == torch.float64:
        return cross_attention_bwd_reference(
            grad, q, k, v, out, lse, media_start, media_stop, max_seqlen_q, max_seqlen_k, softmax_scale, query_grad,
            key_grad,
        )  # fmt: skip
    q, k, v, *ranges = _prepare(q, k, v, media_start, media_stop)
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    total, heads, d = q.shape
    keys, heads_k = k.shape[:2]
    dq, dk, dv = _empty_grads(q, k, v, query_grad, key_grad)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    constants = _constants(q, k, v)
    with device_of(q):
        if total:
            config, tiles, parts = _plan(1, q, k, max_seqlen_q, max_seqlen_k)
            parts = parts if query_grad else 1
            target = dq if parts == 1 else q.new_empty((parts, total, heads, d), dtype=torch.float32)
            _dq_kernel[(tiles * parts,)](
                grad, q, k, v, *ranges, out, lse, lse2, delta, target, total, keys, parts, softmax_scale,
                QUERY_GRAD=query_grad, **constants, **config,
            )  # fmt: skip
            if parts > 1:
                combine(target, None, dq, None)
        config = _config(2, q.dtype, d, heads // heads_k, total)
        if keys and key_grad:
            _dkv_kernel[(cdiv(keys, config["BLOCK_N"]) * heads_k,)](
                grad, q, k, v, *ranges, lse2, delta, dk, dv, total, keys, softmax_scale, SCAN_ROWS=SCAN, **constants,
                **config,
            )  # fmt: skip
    return dq, dk, dv


# 4. operator ----------------------------------------------------------------------------------------------------------
_cross_attention = torch.library.custom_op(
    "fastmllm::cross_attention",
    cross_attention_reference,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor media_start, Tensor media_stop, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float softmax_scale) -> (Tensor, Tensor)",
)
_cross_attention.register_kernel("cuda")(cross_attention_triton)

_cross_attention_bwd = torch.library.custom_op(
    "fastmllm::cross_attention_bwd",
    cross_attention_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor media_start, Tensor media_stop,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, bool query_grad, bool key_grad)"
    " -> (Tensor, Tensor, Tensor)",
)
_cross_attention_bwd.register_kernel("cuda")(cross_attention_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_cross_attention.register_fake
def _(q, k, v, media_start, media_stop, max_seqlen_q, max_seqlen_k, softmax_scale):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=accumulator_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@_cross_attention_bwd.register_fake
def _(grad, q, k, v, out, lse, start, stop, max_seqlen_q, max_seqlen_k, softmax_scale, query_grad, key_grad):
    return _empty_grads(q, k, v, query_grad, key_grad)


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    q, k, v, media_start, media_stop, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, media_start, media_stop)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
    key_grad = needs_k or needs_v
    if grad is None or not (needs_q or key_grad):
        return (None,) * 8
    dq, dk, dv = _cross_attention_bwd(grad.contiguous(), *ctx.saved_tensors, *ctx.options, needs_q, key_grad)
    return dq if needs_q else None, dk if needs_k else None, dv if needs_v else None, None, None, None, None, None


_cross_attention.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_start: Tensor,
    media_stop: Tensor,
    softmax_scale: float | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Let each query row attend to its own range of keys.

    Args:
        q: (T, H, D) queries of all samples, packed.
        k: (N, Hkv, D) keys of all media, packed; Hkv divides H, and query head h reads key head h // (H / Hkv).
        v: (N, Hkv, D) values.
        media_start: (T,) int32, the first key that a row sees, counted in the packed N. `media_ranges` makes the ranges
            of interleaved text, `mask_ranges` those of a tile mask, `segment_ranges` those of latent queries.
        media_stop: (T,) int32, the key behind the last one that it sees. Rows with start >= stop see none.
        softmax_scale: multiplies q k^T; None for D ** -0.5.
        max_seqlen_q: the most neighbouring rows that share a range (32 latents, 1 in decoding); None for T. This and
            `max_seqlen_k` choose tiles and how far the keys are split; with any value only the rounding differs. With
            both given, a sample's result on a GPU has the same bits whatever else is in the batch.
        max_seqlen_k: keys of the longest range; None for N.

    Returns:
        (T, H, D) in the dtype of `q`; a row that sees no key is zero and passes no gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    The cross-attention of OpenFlamingo and Idefics (latest or all images), Llama-3.2-Vision (tile sets), CogAgent (all
    keys), Q-Former and the Perceiver resampler (segments).
    """
    if (
        q.dim() != 3
        or k.dim() != 3
        or k.shape != v.shape
        or q.shape[2] != k.shape[2]
        or not k.shape[1]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"fastmllm::cross_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be "
            "(T, H, D), (N, Hkv, D) and (N, Hkv, D) with Hkv dividing H"
        )
    if not 0 < q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"fastmllm::cross_attention: head dimension {q.shape[2]} of q {tuple(q.shape)} is not 1 to "
                         f"{MAX_HEAD_DIM}")  # fmt: skip
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"fastmllm::cross_attention: q {q.dtype}, k {k.dtype} and v {v.dtype} must be one floating "
                         "dtype")  # fmt: skip
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"fastmllm::cross_attention: q is on {q.device}, k on {k.device} and v on {v.device}: move "
                         "them to one device")  # fmt: skip
    for name, t in (("media_start", media_start), ("media_stop", media_stop)):
        if t.shape != q.shape[:1] or t.dtype != torch.int32 or t.device != q.device:
            raise ValueError(f"fastmllm::cross_attention: {name} {tuple(t.shape)} {t.dtype} on {t.device} must be "
                             f"({q.shape[0]},) int32 on {q.device}, one entry a row of q {tuple(q.shape)}")  # fmt: skip
    longest = [0 if n is None else n for n in (max_seqlen_q, max_seqlen_k)]
    if min(longest) < 0:
        raise ValueError(f"fastmllm::cross_attention: max_seqlen_q {max_seqlen_q} and max_seqlen_k {max_seqlen_k} must "
                         "not be negative")  # fmt: skip
    if softmax_scale is None:
        softmax_scale = q.shape[2] ** -0.5
    out, _ = _cross_attention(q, k, v, media_start, media_stop, *longest, softmax_scale)
    report("cross_attention", q, k, v, media_start, media_stop)
    return out
