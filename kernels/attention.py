"""Scaled dot-product attention over packed, variable-length segments (FlashAttention, arXiv 2205.14135, 2307.08691).

Shapes: T query rows of S segments, H query heads, Hkv key/value heads (Hkv divides H), D head dimension.
`causal` is aligned to the bottom right, as in flash_attn: the last query row of a segment sees all its keys.
A row that sees no key gives zeros. On CUDA the package flash_attn is used where it is installed and works.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ._dense import dense_bwd, dense_fwd, rows_contiguous
from ._tiles import load_lse, load_tile, softmax_end, softmax_step, store_tile
from ._triton import accumulator_dtype, cdiv, device_of, dot, next_power_of_2, tl, triton

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

    def mask(self, q: Tensor, causal: bool) -> tuple[bool, Tensor | None]:
        """Return whether the rows form a causal square, and else the additive mask."""
        square = self.len_q - self.blind == self.len_k
        if not causal or square or self.len_q == 1:
            return causal and square, None
        mask = torch.full((self.len_q, self.len_k), -math.inf, dtype=q.dtype, device=q.device)
        return False, mask.triu_(self.len_k - self.len_q + 1)[None, None]


def _pieces(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool
) -> list[_Piece]:
    """Make one piece of segments of one length; one each of ragged ones.

    Against padding and one masked call, that is 1.1 to 2.8 times faster on a CPU.
    """
    ends = [cu_seqlens_q.tolist(), cu_seqlens_k.tolist()]
    longest = [max((b - a for a, b in pairwise(e)), default=0) for e in ends]
    rows = [q.shape[0], k.shape[0]]
    if [e[-1] for e in ends] != rows or longest[0] > max_seqlen_q or longest[1] > max_seqlen_k:
        raise ValueError(
            f"fastmllm::attention: cu_seqlens end at {ends[0][-1]}, {ends[1][-1]} with segments of up to {longest[0]}, "
            f"{longest[1]} rows, but q and k have {rows[0]}, {rows[1]} rows and max_seqlen is {max_seqlen_q}, "
            f"{max_seqlen_k}"
        )
    segments = len(ends[0]) - 1
    bounds = [(a, b, c, d, 1) for (a, b), (c, d) in zip(pairwise(ends[0]), pairwise(ends[1]), strict=True)]
    if [segments * n for n in longest] == rows and segments:
        bounds = [(0, rows[0], 0, rows[1], segments)]
    pieces = []
    for a, b, c, d, count in bounds:
        len_q, len_k = (b - a) // count, (d - c) // count
        blind = max(len_q - len_k, 0) if causal else 0
        if len_q and len_k:
            pieces.append(_Piece(slice(a, b), slice(c, d), count, len_q, len_k, blind))
    return pieces


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float,
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
        o4, lse4 = dense_fwd(q4, piece.others(k), piece.others(v), *piece.mask(q, causal), softmax_scale)
        if whole:  # the usual case: nothing to assemble
            return o4.transpose(1, 2).reshape(q.shape), lse4.transpose(0, 1).reshape(shape).contiguous()
        piece.queries(out).copy_(o4)
        piece.row_stats(lse).copy_(lse4)
    return out, lse


def attention_bwd_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float,
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
            piece.row_stats(lse), *piece.mask(q, causal), softmax_scale,
        )  # fmt: skip
        if whole:
            dk4, dv4 = (t.transpose(1, 2).reshape(k.shape) for t in (dk4, dv4))
            return dq4.transpose(1, 2).reshape(q.shape), dk4, dv4
        piece.queries(dq).copy_(dq4)
        piece.others(dk).copy_(dk4)
        piece.others(dv).copy_(dv4)
    return dq, dk, dv


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
# One program owns one block of one segment of one head; blocks behind the end of a short segment leave at once.
# `scale2` is the scale times log2(e). Columns up to `whole` need no mask: every row of the block sees them.
@triton.jit
def _locate(cu_q_ptr, cu_k_ptr, blocks, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first row of this program's block, its head, and where its segment lies."""
    program = tl.program_id(0)
    pair = program // blocks
    segment = pair // HEADS
    start_q = tl.load(cu_q_ptr + segment).to(tl.int64)
    start_k = tl.load(cu_k_ptr + segment).to(tl.int64)
    len_q = (tl.load(cu_q_ptr + segment + 1) - start_q).to(tl.int32)
    len_k = (tl.load(cu_k_ptr + segment + 1) - start_k).to(tl.int32)
    return (program % blocks) * BLOCK, (pair % HEADS).to(tl.int64), start_q, start_k, len_q, len_k


@triton.jit
def _key_range(first, len_q, len_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return how many columns all rows of a block see, in whole blocks, and how many any of them sees."""
    if CAUSAL:
        shift = len_k - len_q
        whole = tl.maximum(tl.minimum(len_k, first + 1 + shift), 0)
        return whole // BLOCK_N * BLOCK_N, tl.minimum(len_k, first + BLOCK_M + shift)
    return len_k // BLOCK_N * BLOCK_N, len_k


@triton.jit
def _scores(q, k, cols, rows, len_q, len_k, scale2, CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    s = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32)) * scale2
    if MASKED and CAUSAL:
        s = tl.where(cols[None, :] <= tl.minimum(rows + (len_k - len_q), len_k - 1)[:, None], s, float("-inf"))
    elif MASKED:
        s = tl.where((cols < len_k)[None, :], s, float("-inf"))
    return s


@triton.jit(do_not_specialize=["T", "blocks"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, T, blocks, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, head, start_q, start_k, len_q, len_k = _locate(cu_q_ptr, cu_k_ptr, blocks, HEADS, BLOCK_M)
    if first < len_q:
        rows = first + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr + start_q * Q_ROW + head * Q_HEAD, rows, len_q, Q_ROW, D, BLOCK_D, True)
        k_ptr += start_k * K_ROW + head // GROUP * K_HEAD
        v_ptr += start_k * V_ROW + head // GROUP * V_HEAD
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
                s = _scores(q, k, cols, rows, len_q, len_k, scale2, CAUSAL, TAIL == 1, BLOCK_N)
                v = load_tile(v_ptr, near, len_k, V_ROW, D, BLOCK_D, False)
                acc, peak, total = softmax_step(acc, peak, total, s, v)
        out, lse = softmax_end(acc, peak, total)
        store_tile(out_ptr + (start_q * HEADS + head) * D, out, rows, len_q, HEADS * D, D, BLOCK_D)
        tl.store(lse_ptr + head * T + start_q + rows, lse, mask=rows < len_q)


@triton.jit(do_not_specialize=["T", "blocks"])
def _dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lse2_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, T, blocks, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Give dq, and for the kernel of dk and dv delta = sum(do * out) and log-sum-exp in powers of two."""
    first, head, start_q, start_k, len_q, len_k = _locate(cu_q_ptr, cu_k_ptr, blocks, HEADS, BLOCK_M)
    if first < len_q:
        rows = first + tl.arange(0, BLOCK_M)
        packed = (start_q * HEADS + head) * D
        do = load_tile(do_ptr + packed, rows, len_q, HEADS * D, D, BLOCK_D, True)
        out = load_tile(out_ptr + packed, rows, len_q, HEADS * D, D, BLOCK_D, True)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        lse = load_lse(lse_ptr + head * T + start_q, rows, len_q)
        tl.store(delta_ptr + head * T + start_q + rows, delta, mask=rows < len_q)
        tl.store(lse2_ptr + head * T + start_q + rows, lse, mask=rows < len_q)
        q = load_tile(q_ptr + start_q * Q_ROW + head * Q_HEAD, rows, len_q, Q_ROW, D, BLOCK_D, True)
        k_ptr += start_k * K_ROW + head // GROUP * K_HEAD
        v_ptr += start_k * V_ROW + head // GROUP * V_HEAD
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scale2 = scale * 1.4426950408889634
        whole, end = _key_range(first, len_q, len_k, CAUSAL, BLOCK_M, BLOCK_N)
        for TAIL in tl.static_range(2):
            for start in range(whole if TAIL else 0, end if TAIL else whole, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                near = tl.minimum(cols, len_k - 1) if TAIL else cols  # the mask of the scores drops what is repeated
                k = load_tile(k_ptr, near, len_k, K_ROW, D, BLOCK_D, False)
                v = load_tile(v_ptr, near, len_k, V_ROW, D, BLOCK_D, False)
                s = _scores(q, k, cols, rows, len_q, len_k, scale2, CAUSAL, TAIL == 1, BLOCK_N)
                ds = tl.exp2(s - lse[:, None]) * (dot(do, tl.trans(v), zeros) - delta[:, None])
                dq = dot(ds.to(k.dtype), k, dq)
        store_tile(dq_ptr + packed, dq * scale, rows, len_q, HEADS * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "blocks"])
def _dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, T, blocks, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Give dk and dv of one block of keys: walk the query heads of its group and their rows, so nothing is atomic."""
    first, head, start_q, start_k, len_q, len_k = _locate(cu_q_ptr, cu_k_ptr, blocks, HEADS // GROUP, BLOCK_N)
    if first < len_k:
        cols = first + tl.arange(0, BLOCK_N)
        shift = len_k - len_q
        k = load_tile(k_ptr + start_k * K_ROW + head * K_HEAD, cols, len_k, K_ROW, D, BLOCK_D, True)
        v = load_tile(v_ptr + start_k * V_ROW + head * V_HEAD, cols, len_k, V_ROW, D, BLOCK_D, True)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
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
                if CAUSAL:
                    s = tl.where(cols[:, None] <= rows[None, :] + shift, s, float("-inf"))
                p = tl.exp2(s)
                dv = dot(p.to(do.dtype), do, dv)
                ds = p * (dot(v, tl.trans(do), zeros) - delta[None, :])
                dk = dot(ds.to(q.dtype), q, dk)
        packed = (start_k * (HEADS // GROUP) + head) * D
        store_tile(dk_ptr + packed, dk * scale, cols, len_k, HEADS // GROUP * D, D, BLOCK_D)
        store_tile(dv_ptr + packed, dv, cols, len_k, HEADS // GROUP * D, D, BLOCK_D)


# 3. launchers ---------------------------------------------------------------------------------------------------------
# Head dimension, padded -> (BLOCK_M, BLOCK_N, num_warps, num_stages) of forward, dq, and dk with dv, in 16 bits. These
# do not spill on sm_80, sm_90, sm_100 and gfx942, and keep HGMMA on sm_90 (256 wide: not in dk with dv).
_TILES = {
    16: ((64, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 2)),
    32: ((64, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 2)),
    64: ((64, 64, 4, 2), (64, 64, 4, 2), (16, 64, 4, 2)),
    128: ((64, 32, 4, 3), (64, 64, 4, 2), (16, 64, 8, 2)),
    256: ((64, 32, 8, 2), (64, 16, 8, 2), (16, 32, 4, 2)),
}


def _config(kind: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of the forward (0), dq (1) or dk and dv (2) kernel; fp32 has no tensor cores here: small ones."""
    block_d = max(16, next_power_of_2(head_dim))
    m, n, warps, stages = (32, 32, 4, 1) if dtype == torch.float32 else _TILES[block_d][kind]
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


def _constants(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, int | bool]:
    """Return what a model fixes; strides among it, so that the compiler sees how wide it may load."""
    names = ("Q_ROW", "Q_HEAD", "K_ROW", "K_HEAD", "V_ROW", "V_HEAD")
    strides = dict(zip(names, (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]), strict=True))
    return {**strides, "HEADS": q.shape[1], "GROUP": q.shape[1] // k.shape[1], "CAUSAL": causal, "D": q.shape[2]}


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _reject_double(q)
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    total, heads, d = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((heads, total), dtype=torch.float32)
    config = _config(0, d, q.dtype)
    blocks, segments = cdiv(max_seqlen_q, config["BLOCK_M"]), cu_seqlens_q.numel() - 1
    if total and blocks * segments:
        with device_of(q):
            _fwd_kernel[(blocks * segments * heads,)](
                q, k, v, out, lse, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), total, blocks, softmax_scale,
                **_constants(q, k, v, causal), **config,
            )  # fmt: skip
    return out, lse


def attention_bwd_triton(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _reject_double(q)
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    total, heads, d = q.shape
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    segments = cu_seqlens_q.numel() - 1
    constants = _constants(q, k, v, causal)
    config = _config(1, d, q.dtype)
    blocks = cdiv(max_seqlen_q, config["BLOCK_M"])
    with device_of(q):
        if total and blocks * segments:
            _dq_kernel[(blocks * segments * heads,)](
                grad, q, k, v, out, lse, lse2, delta, dq, cu_seqlens_q, cu_seqlens_k, total, blocks, softmax_scale,
                **constants, **config,
            )  # fmt: skip
        config = _config(2, d, q.dtype)
        blocks = cdiv(max_seqlen_k, config["BLOCK_N"])
        if k.shape[0] and blocks * segments:
            _dkv_kernel[(blocks * segments * k.shape[1],)](
                grad, q, k, v, lse2, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, total, blocks, softmax_scale,
                **constants, **config,
            )  # fmt: skip
    return dq, dk, dv


def _reject_double(q: Tensor) -> None:
    if q.dtype == torch.float64:
        raise ValueError("fastmllm::attention: the Triton kernels compute in float32; move float64 tensors to the CPU")


# flash_attn: generation -> (distribution, module). Installed is not enough: a build without a GPU leaves a shell.
_FLASH = {
    "FA2": ("flash-attn", "flash_attn"),
    "FA3": ("flash-attn-3", "flash_attn_interface"),
    "FA4": ("flash-attn-4", "flash_attn.cute"),
}
_PREFERENCE = {9: ("FA3", "FA4", "FA2"), 10: ("FA4", "FA2"), 11: ("FA4", "FA2")}  # by compute capability, else FA2


@functools.cache
def _load_flash_attn() -> tuple[dict[str, str], dict[str, Callable[..., Tensor | tuple]]]:
    """Return the status of each generation, and the functions of those that can be imported."""
    status, functions = {}, {}
    for name, (distribution, module) in _FLASH.items():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            status[name] = f"{distribution} is not installed"
            continue
        try:
            functions[name] = importlib.import_module(module).flash_attn_varlen_func
            status[name] = f"{distribution} {version}"
        except Exception as error:  # a broken build raises anything
            status[name] = f"{distribution} {version} is installed but does not work: {error}; Triton is used instead"
            warnings.warn(f"fastmllm::attention: {status[name]}", stacklevel=3)
    return status, functions


def flash_attn_status() -> dict[str, str]:
    """Return, for each generation of flash_attn (FA2, FA3, FA4), its version or why it is not used."""
    return dict(_load_flash_attn()[0])


def _capability(q: Tensor) -> int | None:
    """Return the major compute capability of an NVIDIA GPU, None elsewhere."""
    return torch.cuda.get_device_capability(q.device)[0] if q.is_cuda and not torch.version.hip else None


def _choose_flash_attn(q: Tensor, k: Tensor) -> Callable[..., Tensor | tuple] | None:
    """Return the installed varlen function that takes these tensors, or None for our own kernels."""
    capability = _capability(q)
    if capability is None or capability < 8 or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    d = q.shape[2]
    if d % 8 or not (q.numel() and k.numel()):
        return None
    functions = _load_flash_attn()[1]
    for name in _PREFERENCE.get(capability, ("FA2",)):
        if name in functions and (name != "FA4" or (d % 32 == 0 and d <= 128)):
            return functions[name]
    return None


# 4. operator ----------------------------------------------------------------------------------------------------------
_attention = torch.library.custom_op(
    "fastmllm::attention",
    attention_reference,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, bool causal, float softmax_scale) -> (Tensor, Tensor)",
)
_attention.register_kernel("cuda")(attention_triton)

_attention_bwd = torch.library.custom_op(
    "fastmllm::attention_bwd",
    attention_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float softmax_scale)"
    " -> (Tensor, Tensor, Tensor)",
)
_attention_bwd.register_kernel("cuda")(attention_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=accumulator_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@_attention_bwd.register_fake
def _(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    if grad is None:
        return (None,) * 9
    grads = _attention_bwd(grad.contiguous(), *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None, None, None)


_attention.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
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
) -> Tensor:
    """Attend within each segment of a packed batch.

    Args:
        q: (T, H, D) queries; rows of one head may be strided (a slice of a packed QKV).
        k: (N, Hkv, D) keys; Hkv divides H, and query head h reads key head h // (H / Hkv).
        v: (N, Hkv, D) values.
        cu_seqlens_q: (S + 1,) int32 boundaries of the segments in `q`, from 0 to T.
        cu_seqlens_k: (S + 1,) int32 boundaries in `k` and `v`; None when they are those of `q`.
        max_seqlen_q: rows of the longest query segment, or an upper bound. None reads it off `cu_seqlens_q`, which
            makes the host wait for the device.
        max_seqlen_k: the same for the keys.
        causal: let query row i of a segment see its keys up to i + (keys - queries): bottom-right aligned.
        softmax_scale: multiplies q k^T; None for D ** -0.5.

    Returns:
        (T, H, D) in the dtype of `q`; a row that sees no key is zero.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or boundaries do not fit the rows (CPU only: on a
            GPU that check would make the host wait).

    Equal to flash_attn.flash_attn_varlen_func (FlashAttention-2, arXiv 2307.08691).
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    if max_seqlen_q is None:
        max_seqlen_q = _longest(cu_seqlens_q)
    if max_seqlen_k is None:
        max_seqlen_k = max_seqlen_q if cu_seqlens_k is cu_seqlens_q else _longest(cu_seqlens_k)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if torch.compiler.is_compiling() or (flash := _choose_flash_attn(q, k)) is None:
        return _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)[0]
    out = flash(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale, causal=causal,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out  # some generations always return the log-sum-exp


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> None:
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
