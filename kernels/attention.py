"""Scaled dot-product attention over packed, variable-length segments (FlashAttention, arXiv 2205.14135, 2307.08691).

Shapes: T query rows of S segments, H query heads, Hkv key/value heads (Hkv divides H), D head dimension.
`causal` is aligned to the bottom right, as in flash_attn: the last query row of a segment sees all its keys.
A row that sees no key gives zeros, and so do rows behind the last segment (padding), forward and backward, whatever
they hold. On CUDA the package flash_attn is used where it is installed and works; the same input gives the same bits
there too (`_flash_attn`).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._dense import dense_bwd, dense_fwd, rows_contiguous
from ._flash_attn import flash_attention
from ._tiles import clear_behind, load_lse, load_tile, locate, softmax_end, softmax_step, store_tile
from ._triton import accumulator_dtype, cdiv, device_of, dot, next_power_of_2, tl, triton
from ._watch import report

MAX_HEAD_DIM = 256


# 1. reference ---------------------------------------------------------------------------------------------------------
class _Piece(NamedTuple):
    """Segments of one length that a single dense call computes; the first `blind` rows of each see no key."""

    rows: slice
    keys: slice
    segments: int
    len_q: int
    len_k: int
    blind: int

    def queries(self, t: Tensor) -> Tensor:
        return t[self.rows].unflatten(0, (self.segments, self.len_q))[:, self.blind :].transpose(1, 2)  # (B, H, L, D)

    def row_stats(self, t: Tensor) -> Tensor:
        return t[:, self.rows].unflatten(1, (self.segments, self.len_q))[:, :, self.blind :].transpose(0, 1)

    def others(self, t: Tensor) -> Tensor:
        return t[self.keys].unflatten(0, (self.segments, self.len_k)).transpose(1, 2)

    def mask(self, q: Tensor, causal: bool, key_bias: Tensor | None) -> tuple[bool, Tensor | None]:
        """Return whether the rows form a causal square, and what else is added to the scores."""
        bias = None if key_bias is None else key_bias[self.keys].view(self.segments, 1, 1, self.len_k)
        square = self.len_q - self.blind == self.len_k
        if not causal or square or self.len_q == 1:
            return causal and square, bias
        dtype = q.dtype if bias is None else bias.dtype
        mask = torch.full((self.len_q, self.len_k), -math.inf, dtype=dtype, device=q.device)
        mask = mask.triu_(self.len_k - self.len_q + 1)[None, None]
        return False, mask if bias is None else mask + bias


def _pieces(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool
) -> list[_Piece]:
    """Make one piece of segments of one length; one each of ragged ones.

    Against padding and one masked call, that is 1.1 to 2.8 times faster on a CPU.
    """
    ends = [cu_seqlens_q.tolist(), cu_seqlens_k.tolist()]
    longest = [max((b - a for a, b in pairwise(e)), default=0) for e in ends]
    shortest = [min((b - a for a, b in pairwise(e)), default=0) for e in ends]
    last = [e[-1] for e in ends]
    rows = [q.shape[0], k.shape[0]]
    fit = last[0] <= rows[0] and last[1] <= rows[1] and longest[0] <= max_seqlen_q and longest[1] <= max_seqlen_k
    if not fit or min(shortest) < 0 or ends[0][0] or ends[1][0]:
        raise ValueError(
            f"fastmllm::attention: cu_seqlens must ascend from 0, and end at {last[0]}, {last[1]} with segments of up "
            f"to {longest[0]}, {longest[1]} rows, but q and k have {rows[0]}, {rows[1]} rows and max_seqlen is "
            f"{max_seqlen_q}, {max_seqlen_k}"
        )
    segments = len(ends[0]) - 1
    bounds = [(a, b, c, d, 1) for (a, b), (c, d) in zip(pairwise(ends[0]), pairwise(ends[1]), strict=True)]
    if longest == shortest and segments:
        bounds = [(0, last[0], 0, last[1], segments)]
    pieces = []
    for a, b, c, d, count in bounds:
        len_q, len_k = (b - a) // count, (d - c) // count
        blind = max(len_q - len_k, 0) if causal else 0
        if len_q and len_k:
            pieces.append(_Piece(slice(a, b), slice(c, d), count, len_q, len_k, blind))
    return pieces


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float, key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    shape = (q.shape[1], q.shape[0])
    pieces = _pieces(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    whole = len(pieces) == 1 and pieces[0].segments * (pieces[0].len_q - pieces[0].blind) == q.shape[0]
    if not whole:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = q.new_full(shape, -math.inf, dtype=accumulator_dtype(q.dtype))
    for piece in pieces:
        q4 = piece.queries(q)
        o4, lse4 = dense_fwd(q4, piece.others(k), piece.others(v), *piece.mask(q, causal, key_bias), softmax_scale)
        if whole:  # the usual case: nothing to assemble
            return o4.transpose(1, 2).reshape(q.shape), lse4.transpose(0, 1).reshape(shape).contiguous()
        piece.queries(out).copy_(o4)
        piece.row_stats(lse).copy_(lse4)
    return out, lse


def attention_bwd_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float, key_bias: Tensor | None = None,
    query_grad: bool = True, key_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, grad, out = (rows_contiguous(t) for t in (q, k, v, grad, out))
    pieces = _pieces(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    whole = len(pieces) == 1 and pieces[0].segments * (pieces[0].len_q - pieces[0].blind) == q.shape[0]
    whole = whole and pieces[0].segments * pieces[0].len_k == k.shape[0]
    if not whole:
        dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for piece in pieces:
        dq4, dk4, dv4 = dense_bwd(
            piece.queries(grad), piece.queries(q), piece.others(k), piece.others(v), piece.queries(out),
            piece.row_stats(lse), *piece.mask(q, causal, key_bias), softmax_scale,
        )  # fmt: skip
        if whole:
            dq, dk, dv = (g.transpose(1, 2).reshape(t.shape) for g, t in ((dq4, q), (dk4, k), (dv4, v)))
            break
        piece.queries(dq).copy_(dq4)
        piece.others(dk).copy_(dk4)
        piece.others(dv).copy_(dv4)
    dk, dv = (dk, dv) if key_grad else (k.new_empty(0), v.new_empty(0))
    return dq if query_grad else q.new_empty(0), dk, dv


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
# One program owns one block of one segment of one head; blocks behind the end of a short segment leave at once.
# The last `blocks` programs find an empty segment: they share the rows behind the end, for all heads, to clear them.
# `scale2` is the scale times log2(e). Columns up to `whole` need no mask: every row of the block sees them.


@triton.jit
def _key_range(first, len_q, len_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return how many columns all rows of a block see, in whole blocks, and how many any of them sees."""
    if CAUSAL:
        shift = len_k - len_q
        whole = tl.maximum(tl.minimum(len_k, first + 1 + shift), 0)
        return whole // BLOCK_N * BLOCK_N, tl.minimum(len_k, first + BLOCK_M + shift)
    return len_k // BLOCK_N * BLOCK_N, len_k


@triton.jit
def _scores(
    q, k, bias_ptr, near, cols, rows, len_q, len_k, scale2,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    s = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32)) * scale2
    if HAS_BIAS:
        s += (tl.load(bias_ptr + near) * 1.4426950408889634)[None, :]
    if MASKED and CAUSAL:
        s = tl.where(cols[None, :] <= tl.minimum(rows + (len_k - len_q), len_k - 1)[:, None], s, float("-inf"))
    elif MASKED:
        s = tl.where((cols < len_k)[None, :], s, float("-inf"))
    return s


@triton.jit(do_not_specialize=["T", "N", "segments", "blocks"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, T, N, segments, blocks, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    clear_behind(out_ptr, lse_ptr, cu_q_ptr, segments, T, blocks, True, HEADS, D, BLOCK_M, BLOCK_D)
    first, head, start_q, start_k, len_q, len_k = locate(cu_q_ptr, cu_k_ptr, segments, blocks, HEADS, BLOCK_M)
    if first < len_q:
        rows = first + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr + start_q * Q_ROW + head * Q_HEAD, rows, len_q, Q_ROW, D, BLOCK_D, True)
        k_ptr += start_k * K_ROW + head // GROUP * K_HEAD
        v_ptr += start_k * V_ROW + head // GROUP * V_HEAD
        if HAS_BIAS:
            bias_ptr += start_k
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        scale2 = scale * 1.4426950408889634
        whole, end = _key_range(first, len_q, len_k, CAUSAL, BLOCK_M, BLOCK_N)
        for TAIL in tl.static_range(2):
            for start in range(whole if TAIL else 0, end if TAIL else whole, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                near = tl.minimum(cols, len_k - 1) if TAIL else cols  # the mask of the scores drops what is repeated
                k = load_tile(k_ptr, near, len_k, K_ROW, D, BLOCK_D, False)
                s = _scores(
                    q, k, bias_ptr, near, cols, rows, len_q, len_k, scale2, HAS_BIAS, CAUSAL, TAIL == 1, BLOCK_N
                )
                v = load_tile(v_ptr, near, len_k, V_ROW, D, BLOCK_D, False)
                acc, peak, total = softmax_step(acc, peak, total, s, v)
        out, lse = softmax_end(acc, peak, total)
        store_tile(out_ptr + (start_q * HEADS + head) * D, out, rows, len_q, HEADS * D, D, BLOCK_D)
        tl.store(lse_ptr + head * T + start_q + rows, lse, mask=rows < len_q)


@triton.jit(do_not_specialize=["T", "N", "segments", "blocks"])
def _dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, lse2_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr,
    T, N, segments, blocks, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, QUERY_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Give dq, and for the kernel of dk and dv delta = sum(do * out) and log-sum-exp in powers of two."""
    if QUERY_GRAD:
        clear_behind(dq_ptr, lse_ptr, cu_q_ptr, segments, T, blocks, False, HEADS, D, BLOCK_M, BLOCK_D)
    first, head, start_q, start_k, len_q, len_k = locate(cu_q_ptr, cu_k_ptr, segments, blocks, HEADS, BLOCK_M)
    if first < len_q:
        rows = first + tl.arange(0, BLOCK_M)
        packed = (start_q * HEADS + head) * D
        do = load_tile(do_ptr + packed, rows, len_q, HEADS * D, D, BLOCK_D, True)
        out = load_tile(out_ptr + packed, rows, len_q, HEADS * D, D, BLOCK_D, True)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        lse = load_lse(lse_ptr + head * T + start_q, rows, len_q)
        tl.store(delta_ptr + head * T + start_q + rows, delta, mask=rows < len_q)
        tl.store(lse2_ptr + head * T + start_q + rows, lse, mask=rows < len_q)
        if QUERY_GRAD:
            q = load_tile(q_ptr + start_q * Q_ROW + head * Q_HEAD, rows, len_q, Q_ROW, D, BLOCK_D, True)
            k_ptr += start_k * K_ROW + head // GROUP * K_HEAD
            v_ptr += start_k * V_ROW + head // GROUP * V_HEAD
            if HAS_BIAS:
                bias_ptr += start_k
            dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            scale2 = scale * 1.4426950408889634
            whole, end = _key_range(first, len_q, len_k, CAUSAL, BLOCK_M, BLOCK_N)
            for TAIL in tl.static_range(2):
                for start in range(whole if TAIL else 0, end if TAIL else whole, BLOCK_N):
                    cols = start + tl.arange(0, BLOCK_N)
                    near = (
                        tl.minimum(cols, len_k - 1) if TAIL else cols
                    )  # the mask of the scores drops what is repeated
                    k = load_tile(k_ptr, near, len_k, K_ROW, D, BLOCK_D, False)
                    v = load_tile(v_ptr, near, len_k, V_ROW, D, BLOCK_D, False)
                    s = _scores(
                        q, k, bias_ptr, near, cols, rows, len_q, len_k, scale2, HAS_BIAS, CAUSAL, TAIL == 1, BLOCK_N
                    )
                    ds = tl.exp2(s - lse[:, None]) * (dot(do, tl.trans(v), zeros) - delta[:, None])
                    dq = dot(ds.to(k.dtype), k, dq)
            store_tile(dq_ptr + packed, dq * scale, rows, len_q, HEADS * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "N", "segments", "blocks"])
def _dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    T, N, segments, blocks, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Give dk and dv of one block of keys: walk the query heads of its group and their rows, so nothing is atomic."""
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    clear_behind(dk_ptr, lse2_ptr, cu_k_ptr, segments, N, blocks, False, KEY_HEADS, D, BLOCK_N, BLOCK_D)
    clear_behind(dv_ptr, lse2_ptr, cu_k_ptr, segments, N, blocks, False, KEY_HEADS, D, BLOCK_N, BLOCK_D)
    first, head, start_q, start_k, len_q, len_k = locate(cu_q_ptr, cu_k_ptr, segments, blocks, KEY_HEADS, BLOCK_N)
    if first < len_k:
        cols = first + tl.arange(0, BLOCK_N)
        shift = len_k - len_q
        k = load_tile(k_ptr + start_k * K_ROW + head * K_HEAD, cols, len_k, K_ROW, D, BLOCK_D, True)
        v = load_tile(v_ptr + start_k * V_ROW + head * V_HEAD, cols, len_k, V_ROW, D, BLOCK_D, True)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + start_k + cols, mask=cols < len_k, other=0.0) * 1.4426950408889634
        begin = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M if CAUSAL else 0
        for h in range(GROUP):
            one = head * GROUP + h
            for start in range(begin, len_q, BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)
                near = tl.minimum(rows, len_q - 1)  # rows behind the end have p = 0, whatever they repeat
                q = load_tile(q_ptr + start_q * Q_ROW + one * Q_HEAD, near, len_q, Q_ROW, D, BLOCK_D, False)
                do = load_tile(do_ptr + (start_q * HEADS + one) * D, near, len_q, HEADS * D, D, BLOCK_D, False)
                lse = tl.load(lse2_ptr + one * T + start_q + rows, mask=rows < len_q, other=float("inf"))
                delta = tl.load(delta_ptr + one * T + start_q + near)
                s = dot(k, tl.trans(q), zeros) * (scale * 1.4426950408889634) - lse[None, :]  # (BLOCK_N, BLOCK_M)
                if HAS_BIAS:
                    s += bias[:, None]
                if CAUSAL:
                    s = tl.where(cols[:, None] <= rows[None, :] + shift, s, float("-inf"))
                p = tl.exp2(s)
                dv = dot(p.to(do.dtype), do, dv)
                ds = p * (dot(v, tl.trans(do), zeros) - delta[None, :])
                dk = dot(ds.to(q.dtype), q, dk)
        packed = (start_k * KEY_HEADS + head) * D
        store_tile(dk_ptr + packed, dk * scale, cols, len_k, KEY_HEADS * D, D, BLOCK_D)
        store_tile(dv_ptr + packed, dv, cols, len_k, KEY_HEADS * D, D, BLOCK_D)


# 3. launchers ---------------------------------------------------------------------------------------------------------
# Head dimension, padded -> (BLOCK_M, BLOCK_N, num_warps, num_stages) of forward, dq, and dk with dv, in 16 bits. These
# do not spill on sm_80, sm_90, sm_100 and gfx942, and keep HGMMA on sm_90 (256 wide: not in dk with dv).
_TILES = {
    16: ((64, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 2)),
    32: ((64, 32, 4, 3), (64, 64, 4, 3), (32, 64, 4, 2)),
    64: ((64, 32, 4, 3), (64, 64, 4, 2), (16, 64, 4, 2)),
    128: ((64, 32, 4, 3), (64, 64, 4, 2), (16, 64, 8, 2)),
    256: ((64, 32, 8, 2), (64, 16, 8, 2), (16, 32, 4, 2)),
}
_FP32_TILES = {  # no tensor cores here; up to 128 wide nothing spills, at 256 dq does (and dk with dv, on gfx942)
    16: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    32: ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    64: ((64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 4, 1)),
    128: ((16, 32, 8, 1), (16, 16, 8, 1), (16, 32, 4, 1)),
    256: ((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
_FP32_PADDED = {(2, 128): (16, 16, 4, 1)}  # heads of 72 to 96, whose mask needs registers
_BIASED = {(1, 128): (64, 32, 4, 1), (0, 256): (64, 16, 8, 2)}  # where the bias needs the registers of half a tile


def _config(kind: int, head_dim: int, dtype: torch.dtype, biased: bool) -> dict[str, int]:
    """Return the tile of the forward (0), dq (1) or dk and dv (2) kernel."""
    block_d = max(16, next_power_of_2(head_dim))
    m, n, warps, stages = (_FP32_TILES if dtype == torch.float32 else _TILES)[block_d][kind]
    if dtype == torch.float32 and head_dim < block_d:
        m, n, warps, stages = _FP32_PADDED.get((kind, block_d), (m, n, warps, stages))
    elif biased and dtype != torch.float32:
        m, n, warps, stages = _BIASED.get((kind, block_d), (m, n, warps, stages))
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


def _constants(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_bias: Tensor | None) -> dict[str, int | bool]:
    """Return what a model fixes; strides among it, so that the compiler sees how wide it may load."""
    names = ("Q_ROW", "Q_HEAD", "K_ROW", "K_HEAD", "V_ROW", "V_HEAD")
    strides = dict(zip(names, (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]), strict=True))
    heads = {"HEADS": q.shape[1], "GROUP": q.shape[1] // k.shape[1], "D": q.shape[2]}
    return {**strides, **heads, "CAUSAL": causal, "HAS_BIAS": key_bias is not None}


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float, key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.dtype == torch.float64:
        return attention_reference(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, key_bias
        )
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    total, heads, d = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((heads, total), dtype=torch.float32)
    config = _config(0, d, q.dtype, key_bias is not None)
    blocks, segments = max(cdiv(max_seqlen_q, config["BLOCK_M"]), 1), cu_seqlens_q.numel() - 1
    if total:
        with device_of(q):
            _fwd_kernel[(blocks * (segments * heads + 1),)](
                q, k, v, q if key_bias is None else key_bias.contiguous(), out, lse, cu_seqlens_q.contiguous(),
                cu_seqlens_k.contiguous(), total, k.shape[0], segments, blocks, softmax_scale,
                **_constants(q, k, v, causal, key_bias), **config,
            )  # fmt: skip
    return out, lse


def _empty_grads(q: Tensor, k: Tensor, v: Tensor, query_grad: bool, key_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if query_grad else q.new_empty(0)
    dk, dv = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if key_grad else t.new_empty(0) for t in (k, v)
    )
    return dq, dk, dv


def attention_bwd_triton(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float, key_bias: Tensor | None = None,
    query_grad: bool = True, key_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if q.dtype == torch.float64:
        return attention_bwd_reference(
            grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale,
            key_bias, query_grad, key_grad,
        )  # fmt: skip
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    bias = q if key_bias is None else key_bias.contiguous()
    (total, heads, d), (keys, heads_k, _) = q.shape, k.shape
    dq, dk, dv = _empty_grads(q, k, v, query_grad, key_grad)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    segments = cu_seqlens_q.numel() - 1
    constants = _constants(q, k, v, causal, key_bias)
    config = _config(1, d, q.dtype, key_bias is not None)
    blocks = max(cdiv(max_seqlen_q, config["BLOCK_M"]), 1)
    with device_of(q):
        if total:
            _dq_kernel[(blocks * (segments * heads + 1),)](
                grad, q, k, v, bias, out, lse, lse2, delta, dq, cu_seqlens_q, cu_seqlens_k, total, keys, segments,
                blocks, softmax_scale, QUERY_GRAD=query_grad, **constants, **config,
            )  # fmt: skip
        config = _config(2, d, q.dtype, key_bias is not None)
        blocks = max(cdiv(max_seqlen_k, config["BLOCK_N"]), 1)
        if keys and key_grad:
            _dkv_kernel[(blocks * (segments * heads_k + 1),)](
                grad, q, k, v, bias, lse2, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, total, keys, segments, blocks,
                softmax_scale, **constants, **config,
            )  # fmt: skip
    return dq, dk, dv


# 4. operator ----------------------------------------------------------------------------------------------------------
_attention = torch.library.custom_op(
    "fastmllm::attention",
    attention_reference,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, bool causal, float softmax_scale, Tensor? key_bias=None) -> (Tensor, Tensor)",
)
_attention.register_kernel("cuda")(attention_triton)

_attention_bwd = torch.library.custom_op(
    "fastmllm::attention_bwd",
    attention_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float softmax_scale,"
    " Tensor? key_bias=None, bool query_grad=True, bool key_grad=True) -> (Tensor, Tensor, Tensor)",
)
_attention_bwd.register_kernel("cuda")(attention_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, key_bias=None):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=accumulator_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@_attention_bwd.register_fake
def _(
    grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale,
    key_bias=None, query_grad=True, key_grad=True,
):  # fmt: skip
    return _empty_grads(q, k, v, query_grad, key_grad)


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options, key_bias = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_bias)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
    key_grad = needs_k or needs_v
    if grad is None or not (needs_q or key_grad):
        return (None,) * 10
    *saved, key_bias = ctx.saved_tensors
    dq, dk, dv = _attention_bwd(grad.contiguous(), *saved, *ctx.options, key_bias, needs_q, key_grad)
    return dq if needs_q else None, dk if needs_k else None, dv if needs_v else None, *(None,) * 7


_attention.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None,
              max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, causal: bool = False,
              softmax_scale: float | None = None, key_bias: Tensor | None = None, *,
              return_lse: Literal[False] = False) -> Tensor: ...  # fmt: skip


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None,
              max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, causal: bool = False,
              softmax_scale: float | None = None, key_bias: Tensor | None = None, *,
              return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    key_bias: Tensor | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within each segment of a packed batch.

    A window of a two-dimensional window attention (Qwen2.5-VL) is a segment: order the rows by window.

    Args:
        q: (T, H, D) queries; rows of one head may be strided (a slice of a packed QKV).
        k: (N, Hkv, D) keys; Hkv divides H, and query head h reads key head h // (H / Hkv).
        v: (N, Hkv, D) values.
        cu_seqlens_q: (S + 1,) int32 boundaries of the segments in `q`, ascending from 0. Rows behind the last one are
            padding: they are never read, and their results and gradients are zeros.
        cu_seqlens_k: (S + 1,) int32 boundaries in `k` and `v`; None when they are those of `q`.
        max_seqlen_q: rows of the longest query segment, or an upper bound. None reads it off `cu_seqlens_q`, which
            makes the host wait for the device.
        max_seqlen_k: the same for the keys.
        causal: let query row i of a segment see its keys up to i + (keys - queries): bottom-right aligned.
        softmax_scale: multiplies q k^T; None for D ** -0.5.
        key_bias: (N,) fp32 (fp64 with fp64), finite, added to the scores of a key in every row and head: ToMe's
            proportional attention adds the log of a merged token's size. It gets no gradient. flash_attn does not
            take it: our kernels run.
        return_lse: return the log-sum-exp of the scores too, which `attention_scores` reads.

    Returns:
        (T, H, D) in the dtype of `q`; a row that sees no key is zero. With `return_lse` also (H, T) fp32 (fp64 for
        fp64), the natural log-sum-exp, without gradient; -inf for rows that see no key.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, `key_bias` requires a gradient, or boundaries do
            not fit the rows (CPU only: on a GPU that check would make the host wait).

    Equal to flash_attn.flash_attn_varlen_func (FlashAttention-2, arXiv 2307.08691); with `key_bias` to proportional
    attention (Token Merging, arXiv 2210.09461).
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias)
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    if max_seqlen_q is None:
        max_seqlen_q = _longest(cu_seqlens_q)
    if max_seqlen_k is None:
        max_seqlen_k = max_seqlen_q if cu_seqlens_k is cu_seqlens_q else _longest(cu_seqlens_k)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    args = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
    result = None
    if key_bias is None and not torch.compiler.is_compiling():
        result = flash_attention(*args, return_lse)
    if result is None:
        result = _attention(*args, key_bias)
    report("attention", q, k, v, cu_seqlens_q, cu_seqlens_k, causal)
    return result if return_lse else result[0]


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, key_bias: Tensor | None
) -> None:
    if (
        q.dim() != 3
        or k.dim() != 3
        or k.shape != v.shape
        or q.shape[-1] != k.shape[-1]
        or not k.shape[1]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"fastmllm::attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (T, H, D), "
            "(N, Hkv, D) and (N, Hkv, D) with Hkv dividing H"
        )
    if not 0 < q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"fastmllm::attention: head dimension {q.shape[-1]} of q {tuple(q.shape)} is not 1 to "
                         f"{MAX_HEAD_DIM}")  # fmt: skip
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"fastmllm::attention: q {q.dtype}, k {k.dtype} and v {v.dtype} must be one floating dtype")
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"fastmllm::attention: q is on {q.device}, k on {k.device} and v on {v.device}: move them to "
                         "one device")  # fmt: skip
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu is not None and (cu.dim() != 1 or cu.numel() < 1 or cu.dtype != torch.int32 or cu.device != q.device):
            raise ValueError(f"fastmllm::attention: {name} {tuple(cu.shape)} {cu.dtype} on {cu.device} must be "
                             f"(S + 1,) int32 on {q.device}")  # fmt: skip
    if cu_seqlens_k is not None and cu_seqlens_k.numel() != cu_seqlens_q.numel():
        raise ValueError(f"fastmllm::attention: cu_seqlens_q {tuple(cu_seqlens_q.shape)} and cu_seqlens_k "
                         f"{tuple(cu_seqlens_k.shape)} differ in segments")  # fmt: skip
    if cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"fastmllm::attention: q {tuple(q.shape)} and k {tuple(k.shape)} have different rows: give "
                         "cu_seqlens_k")  # fmt: skip
    if key_bias is not None:
        acc = accumulator_dtype(q.dtype)
        if key_bias.shape != k.shape[:1] or key_bias.dtype != acc or key_bias.device != q.device:
            raise ValueError(f"fastmllm::attention: key_bias {tuple(key_bias.shape)} {key_bias.dtype} on "
                             f"{key_bias.device} must be ({k.shape[0]},) {acc} on {q.device}")  # fmt: skip
        if key_bias.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"fastmllm::attention: key_bias {tuple(key_bias.shape)} gets no gradient: detach it")
