"""Scaled dot-product attention over packed, variable-length segments (FlashAttention, arXiv 2205.14135, 2307.08691).

Shapes: T query rows of S segments, H query heads, Hkv key/value heads (Hkv divides H), D head dimension.
`causal` is aligned to the bottom right, as in flash_attn: the last query row of a segment sees all its keys.
A row that sees no key gives zeros. On CUDA the package flash_attn is used where it is installed and works.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ._triton import accumulator_dtype

MAX_HEAD_DIM = 256
SHORT = 192  # up to here torch's CPU backward is 2 to 7 times faster when bf16 is widened to fp32 first


# 1. reference ---------------------------------------------------------------------------------------------------------
def _pieces(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, total_q: int, total_k: int
) -> list[tuple[int, int, int, int, int]]:
    """Return (start_q, stop_q, start_k, stop_k, segments) of the pieces that one dense call each computes.

    Segments of one length make a single batch. Ragged ones are called one by one: measured against padding, that is
    1.1 to 2.8 times faster on a CPU, and it needs no mask.
    """
    segments = cu_seqlens_q.numel() - 1
    starts_q = cu_seqlens_q.tolist()
    starts_k = starts_q if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.tolist()
    longest_q = max((b - a for a, b in pairwise(starts_q)), default=0)
    longest_k = max((b - a for a, b in pairwise(starts_k)), default=0)
    if (starts_q[-1], starts_k[-1]) != (total_q, total_k) or longest_q > max_seqlen_q or longest_k > max_seqlen_k:
        raise ValueError(
            f"fastmllm::attention: cu_seqlens end at {starts_q[-1]}, {starts_k[-1]} with segments of up to "
            f"{longest_q}, {longest_k} rows, but q and k have {total_q}, {total_k} rows and max_seqlen is "
            f"{max_seqlen_q}, {max_seqlen_k}"
        )
    if segments * longest_q == total_q and segments * longest_k == total_k:
        return [(0, total_q, 0, total_k, segments)]
    ends = zip(pairwise(starts_q), pairwise(starts_k), strict=True)
    return [(a, b, c, d, 1) for (a, b), (c, d) in ends if b > a]


def _dense(
    q: Tensor, k: Tensor, v: Tensor, piece: tuple[int, int, int, int, int], causal: bool
) -> tuple[Tensor, Tensor, Tensor, int, bool, Tensor | None]:
    """Return the (B, heads, L, D) views of a piece, the leading rows that see no key, and how to mask the others."""
    start_q, stop_q, start_k, stop_k, segments = piece
    len_q, len_k = (stop_q - start_q) // max(segments, 1), (stop_k - start_k) // max(segments, 1)
    blind = min(len_q, max(len_q - len_k, 0)) if causal or len_k == 0 else 0
    q4 = q[start_q:stop_q].unflatten(0, (segments, len_q))[:, blind:].transpose(1, 2)
    k4 = k[start_k:stop_k].unflatten(0, (segments, len_k)).transpose(1, 2)
    v4 = v[start_k:stop_k].unflatten(0, (segments, len_k)).transpose(1, 2)
    square = len_q - blind == len_k
    mask = None
    if causal and not square and len_q > 1:
        mask = torch.full((len_q, len_k), -math.inf, dtype=q.dtype, device=q.device).triu_(len_k - len_q + 1)
    return q4, k4, v4, blind, causal and square, None if mask is None else mask[None, None]


def _fused(q: Tensor) -> bool:
    """Tell whether torch has its fused kernel for `q`: GQA, every dtype, and it returns the log-sum-exp."""
    return q.device.type == "cpu"


def _dense_fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if _fused(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    scores = _scores(q, k, causal, mask, scale)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ _repeat(v, q).to(scores.dtype)).to(q.dtype), lse


def _dense_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _fused(q):
        dtype = q.dtype
        if dtype in (torch.bfloat16, torch.float16) and q.shape[2] <= SHORT and k.shape[2] <= SHORT:
            grad, q, k, v, out = (t.float() for t in (grad, q, k, v, out))
            mask = None if mask is None else mask.float()
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        return tuple(t.to(dtype) for t in grads)
    p = (_scores(q, k, causal, mask, scale) - lse[..., None]).exp()
    grad = grad.to(p.dtype)
    delta = (grad * out.to(p.dtype)).sum(-1, keepdim=True)
    ds = p * (grad @ _repeat(v, q).to(p.dtype).mT - delta) * scale
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    dk = (ds.mT @ q.to(p.dtype)).unflatten(1, heads).sum(2)
    dv = (p.mT @ grad).unflatten(1, heads).sum(2)
    return (ds @ _repeat(k, q).to(p.dtype)).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _repeat(t: Tensor, q: Tensor) -> Tensor:
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _scores(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, scale: float) -> Tensor:
    acc = accumulator_dtype(q.dtype)
    scores = (q.to(acc) @ _repeat(k, q).to(acc).mT) * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
    return scores


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = (_rows_contiguous(t) for t in (q, k, v))
    total, heads, _ = q.shape
    pieces = _pieces(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, total, k.shape[0])
    out, lse = None, None
    for piece in pieces:
        q4, k4, v4, blind, is_causal, mask = _dense(q, k, v, piece, causal)
        if q4.numel():
            o4, lse4 = _dense_fwd(q4, k4, v4, is_causal, mask, softmax_scale)
            if piece[1] - piece[0] == total and not blind:  # the usual case: nothing to assemble
                return o4.transpose(1, 2).reshape(q.shape), lse4.transpose(0, 1).reshape(heads, total).contiguous()
        if out is None:
            out = torch.zeros_like(q, memory_format=torch.contiguous_format)
            lse = q.new_full((heads, total), -math.inf, dtype=accumulator_dtype(q.dtype))
        if q4.numel():
            rows, length = slice(piece[0], piece[1]), blind + q4.shape[2]
            out[rows].unflatten(0, (piece[4], length))[:, blind:] = o4.transpose(1, 2)
            lse[:, rows].unflatten(1, (piece[4], length))[:, :, blind:] = lse4.transpose(0, 1)
    if out is None:
        out, lse = torch.zeros_like(q), q.new_full((heads, total), -math.inf, dtype=accumulator_dtype(q.dtype))
    return out, lse


def attention_bwd_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, grad = (_rows_contiguous(t) for t in (q, k, v, grad))
    total = q.shape[0]
    pieces = _pieces(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, total, k.shape[0])
    grads = None
    for piece in pieces:
        q4, k4, v4, blind, is_causal, mask = _dense(q, k, v, piece, causal)
        if q4.numel():
            rows, lengths = slice(piece[0], piece[1]), (piece[4], blind + q4.shape[2])
            o4, g4 = (t[rows].unflatten(0, lengths)[:, blind:].transpose(1, 2) for t in (out, grad))
            lse4 = lse[:, rows].unflatten(1, lengths)[:, :, blind:].transpose(0, 1)
            dq, dk, dv = _dense_bwd(g4, q4, k4, v4, o4, lse4, is_causal, mask, softmax_scale)
            if piece[1] - piece[0] == total and piece[3] - piece[2] == k.shape[0] and not blind:
                return tuple(d.transpose(1, 2).reshape(t.shape) for d, t in ((dq, q), (dk, k), (dv, v)))
        if grads is None:
            grads = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        if q4.numel():
            grads[0][rows].unflatten(0, lengths)[:, blind:] = dq.transpose(1, 2)
            for d, total_d in ((dk, grads[1]), (dv, grads[2])):
                total_d[piece[2] : piece[3]].unflatten(0, (piece[4], d.shape[2])).copy_(d.transpose(1, 2))
    return grads or tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _rows_contiguous(t: Tensor) -> Tensor:
    """Return `t` with unit stride in the head dimension: slices of a packed QKV are taken as they are."""
    return t if t.stride(-1) == 1 else t.contiguous()


# 4. operator ----------------------------------------------------------------------------------------------------------
_attention = torch.library.custom_op(
    "fastmllm::attention",
    attention_reference,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, bool causal, float softmax_scale) -> (Tensor, Tensor)",
)
_attention_bwd = torch.library.custom_op(
    "fastmllm::attention_bwd",
    attention_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float softmax_scale)"
    " -> (Tensor, Tensor, Tensor)",
)


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
    return _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)[0]


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
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
