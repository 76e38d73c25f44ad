"""Rotary positions on a packed QKV: q and k turned, v handed on (RoFormer, arXiv 2104.09864; 2-D as in Qwen2-VL).

Shapes: T packed tokens, H query and Hkv key heads, D head dimension, R <= D rotary dimension. The tables are (T, R/2):
`_rope_tables` makes them. Arithmetic is fp32 in registers; no fp32 copy, no transpose, no concatenation is stored. The
backward turns the three gradients back and writes them as one packed gradient, ready for the projection's backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native  # noqa: F401 - its C++ implementation registers itself
from ._triton import accumulator_dtype, cdiv, device_of, next_power_of_2, tl, triton


# 1. reference ---------------------------------------------------------------------------------------------------------
def vision_rope_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, interleaved: bool, copy_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split([num_heads, num_kv_heads, qkv.shape[1] - num_heads - num_kv_heads], dim=1)
    values = v.clone(memory_format=torch.contiguous_format) if copy_values else qkv.new_empty(0)
    return _turn(q, cos, sin, interleaved), _turn(k, cos, sin, interleaved), values


def vision_rope_bwd_reference(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> Tensor:
    return torch.cat([_turn(grad_q, cos, -sin, interleaved), _turn(grad_k, cos, -sin, interleaved), grad_v], dim=1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first R entries of every head of x (T, H, D); contiguous."""
    acc = accumulator_dtype(x.dtype)
    cos, sin = cos.to(acc).unsqueeze(1), sin.to(acc).unsqueeze(1)  # (T, 1, R/2)
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    pair = first * cos - second * sin, second * cos + first * sin  # type promotion lifts bf16 to the tables' fp32
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    turned = turned.to(x.dtype)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned.contiguous()


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _turn_tile(
    src_ptr, dst_ptr, cos_ptr, sin_ptr, left, first, SRC_T: tl.constexpr, DST_T: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Turn heads [first, first + BLOCK_H) of `left` tokens; the tables are read once for all of these heads."""
    t = tl.arange(0, BLOCK_T)
    h = first + tl.arange(0, BLOCK_H)
    r = tl.arange(0, BLOCK_R)
    table = t[:, None] * HALF + r[None, :]
    seen = (t < left)[:, None] & (r < HALF)[None, :]
    cos = tl.load(cos_ptr + table, mask=seen, other=0.0).to(tl.float32)[:, None, :]  # (BLOCK_T, 1, BLOCK_R)
    sin = tl.load(sin_ptr + table, mask=seen, other=0.0).to(tl.float32)[:, None, :]
    if INVERSE:
        sin = -sin
    rows = (t < left)[:, None, None] & (h < H)[None, :, None]
    src = src_ptr + t[:, None, None] * SRC_T + h[None, :, None] * D
    dst = dst_ptr + t[:, None, None] * DST_T + h[None, :, None] * D
    if INTERLEAVED:
        c = tl.arange(0, 2 * BLOCK_R)[None, None, :]
        mask = rows & (c < 2 * HALF)
        pairs = tl.load(src + c, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, (BLOCK_T, BLOCK_H, BLOCK_R, 2)))
        pairs = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK_T, BLOCK_H, 2 * BLOCK_R))
        tl.store(dst + c, pairs.to(dst_ptr.dtype.element_ty), mask=mask)
    else:
        c = r[None, None, :]
        mask = rows & (c < HALF)
        a = tl.load(src + c, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(src + HALF + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(dst + c, (a * cos - b * sin).to(dst_ptr.dtype.element_ty), mask=mask)
        tl.store(dst + HALF + c, (b * cos + a * sin).to(dst_ptr.dtype.element_ty), mask=mask)
    if 2 * HALF < D:  # what a partial rotation leaves alone
        c = 2 * HALF + tl.arange(0, BLOCK_REST)[None, None, :]
        mask = rows & (c < D)
        tl.store(dst + c, tl.load(src + c, mask=mask, other=0.0), mask=mask)


@triton.jit
def _copy_tile(
    src_ptr, dst_ptr, left, first, SRC_T: tl.constexpr, DST_T: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy heads [first, first + BLOCK_H) of `left` tokens."""
    t = tl.arange(0, BLOCK_T)[:, None, None]
    h = first + tl.arange(0, BLOCK_H)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    mask = (t < left) & (h < H) & (d < D)
    x = tl.load(src_ptr + t * SRC_T + h * D + d, mask=mask, other=0.0)
    tl.store(dst_ptr + t * DST_T + h * D + d, x, mask=mask)


@triton.jit
def _rope_kernel(
    packed_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, T, PACKED_T: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr,
    HV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Turn packed into q, k, v; INVERSE turns q, k, v (gradients) back into packed. A program has heads of one of them.

    Offsets are int64 up to the block of tokens and int32 inside it.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    block = tl.program_id(1)
    left = T - start
    packed = packed_ptr + start * PACKED_T
    q = q_ptr + start * (HQ * D)
    k = k_ptr + start * (HK * D)
    cos = cos_ptr + start * HALF
    sin = sin_ptr + start * HALF
    Q_BLOCKS: tl.constexpr = (HQ + BLOCK_H - 1) // BLOCK_H
    K_BLOCKS: tl.constexpr = (HK + BLOCK_H - 1) // BLOCK_H
    if block < Q_BLOCKS:
        if INVERSE:
            _turn_tile(q, packed, cos, sin, left, block * BLOCK_H, HQ * D, PACKED_T, HQ, D, HALF, INVERSE, INTERLEAVED,
                       BLOCK_T, BLOCK_H, BLOCK_R, BLOCK_REST)  # fmt: skip
        else:
            _turn_tile(packed, q, cos, sin, left, block * BLOCK_H, PACKED_T, HQ * D, HQ, D, HALF, INVERSE, INTERLEAVED,
                       BLOCK_T, BLOCK_H, BLOCK_R, BLOCK_REST)  # fmt: skip
    elif block < Q_BLOCKS + K_BLOCKS:
        first = (block - Q_BLOCKS) * BLOCK_H
        if INVERSE:
            _turn_tile(k, packed + HQ * D, cos, sin, left, first, HK * D, PACKED_T, HK, D, HALF, INVERSE, INTERLEAVED,
                       BLOCK_T, BLOCK_H, BLOCK_R, BLOCK_REST)  # fmt: skip
        else:
            _turn_tile(packed + HQ * D, k, cos, sin, left, first, PACKED_T, HK * D, HK, D, HALF, INVERSE, INTERLEAVED,
                       BLOCK_T, BLOCK_H, BLOCK_R, BLOCK_REST)  # fmt: skip
    elif HV > 0:
        first = (block - Q_BLOCKS - K_BLOCKS) * BLOCK_H
        values = packed + (HQ + HK) * D
        v = v_ptr + start * (HV * D)
        if INVERSE:
            _copy_tile(v, values, left, first, HV * D, PACKED_T, HV, D, BLOCK_T, BLOCK_H, BLOCK_D)
        else:
            _copy_tile(values, v, left, first, PACKED_T, HV * D, HV, D, BLOCK_T, BLOCK_H, BLOCK_D)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(heads: int, half: int, head_dim: int) -> dict[str, int]:
    """Return the tile: 2048 pairs where the heads allow it."""
    block_r = next_power_of_2(half)
    block_h = min(next_power_of_2(heads), 16, max(1, 2048 // block_r))
    return {
        "BLOCK_T": max(1, min(16, 2048 // (block_r * block_h))),
        "BLOCK_H": block_h,
        "BLOCK_R": block_r,
        "BLOCK_REST": next_power_of_2(head_dim - 2 * half),
        "BLOCK_D": next_power_of_2(head_dim),
        "num_warps": 4,
    }


def _launch(
    packed: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool
) -> None:
    tokens, head_dim = packed.shape[0], packed.shape[2]
    heads = [t.shape[1] if t.dim() == 3 else 0 for t in (q, k, v)]
    config = _config(max(heads), cos.shape[1], head_dim)
    blocks = sum(cdiv(n, config["BLOCK_H"]) for n in heads)
    if tokens and head_dim and blocks:
        with device_of(packed):
            _rope_kernel[(cdiv(tokens, config["BLOCK_T"]), blocks)](
                packed, q, k, v, cos.contiguous(), sin.contiguous(), tokens, PACKED_T=packed.stride(0), HQ=heads[0],
                HK=heads[1], HV=heads[2], D=head_dim, HALF=cos.shape[1], INVERSE=inverse, INTERLEAVED=interleaved,
                **config,
            )  # fmt: skip


def vision_rope_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, interleaved: bool, copy_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.dtype == torch.float64:
        return vision_rope_reference(qkv, cos, sin, num_heads, num_kv_heads, interleaved, copy_values)
    tokens, heads, head_dim = qkv.shape
    if qkv.stride()[1:] != (head_dim, 1):  # rows may be strided
        qkv = qkv.contiguous()
    q, k = (qkv.new_empty((tokens, n, head_dim)) for n in (num_heads, num_kv_heads))
    v = qkv.new_empty((tokens, heads - num_heads - num_kv_heads, head_dim) if copy_values else 0)
    _launch(qkv, q, k, v, cos, sin, False, interleaved)
    return q, k, v


def vision_rope_bwd_triton(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> Tensor:
    if grad_q.dtype == torch.float64:
        return vision_rope_bwd_reference(grad_q, grad_k, grad_v, cos, sin, interleaved)
    grad_q, grad_k, grad_v = grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()
    tokens, _, head_dim = grad_q.shape
    packed = grad_q.new_empty((tokens, grad_q.shape[1] + grad_k.shape[1] + grad_v.shape[1], head_dim))
    _launch(packed, grad_q, grad_k, grad_v, cos, sin, True, interleaved)
    return packed


# 4. operator ----------------------------------------------------------------------------------------------------------
_vision_rope = torch.library.custom_op(
    "fastmllm::vision_rope",
    vision_rope_reference,
    mutates_args=(),
    schema="(Tensor qkv, Tensor cos, Tensor sin, int num_heads, int num_kv_heads, bool interleaved, bool copy_values)"
    " -> (Tensor, Tensor, Tensor)",
)
_vision_rope.register_kernel("cuda")(vision_rope_triton)

_vision_rope_bwd = torch.library.custom_op(
    "fastmllm::vision_rope_bwd",
    vision_rope_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
)
_vision_rope_bwd.register_kernel("cuda")(vision_rope_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_vision_rope.register_fake
def _(qkv, cos, sin, num_heads, num_kv_heads, interleaved, copy_values):
    tokens, heads, head_dim = qkv.shape
    v = qkv.new_empty(tokens, heads - num_heads - num_kv_heads, head_dim) if copy_values else qkv.new_empty(0)
    return qkv.new_empty(tokens, num_heads, head_dim), qkv.new_empty(tokens, num_kv_heads, head_dim), v


@_vision_rope_bwd.register_fake
def _(grad_q, grad_k, grad_v, cos, sin, interleaved):
    tokens, heads, head_dim = grad_q.shape
    return grad_q.new_empty(tokens, heads + grad_k.shape[1] + grad_v.shape[1], head_dim)


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    qkv, cos, sin, ctx.num_heads, ctx.num_kv_heads, ctx.interleaved, _ = inputs
    ctx.shape, ctx.dtype = qkv.shape, qkv.dtype
    ctx.save_for_backward(cos, sin)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_q, grad_k, grad_v):
    if not ctx.needs_input_grad[0] or (grad_q is None and grad_k is None and grad_v is None):
        return (None,) * 7
    cos, sin = ctx.saved_tensors
    tokens, heads, head_dim = ctx.shape
    counts = ctx.num_heads, ctx.num_kv_heads, heads - ctx.num_heads - ctx.num_kv_heads
    grads = [
        cos.new_zeros((tokens, n, head_dim), dtype=ctx.dtype) if grad is None or grad.dim() != 3 else grad.contiguous()
        for n, grad in zip(counts, (grad_q, grad_k, grad_v), strict=True)
    ]
    return _vision_rope_bwd(*grads, cos, sin, ctx.interleaved), None, None, None, None, None, None


_vision_rope.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def vision_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn q and k of a packed QKV by their positions and split it.

    What is moved, in units of one T x H x D tensor, for Hkv = H: without autograd 2 read and 2 written, v is a view of
    `qkv`. Under autograd v is copied too (3 and 3): then the packed projection is freed, so that attention keeps 3
    units for its backward and not 5, and the backward writes one packed gradient straight from the three (3 and 3),
    without autograd's concatenation (another 3 and 3). Only the tables are saved.

    Args:
        qkv: (T, H + 2 Hkv, D) float, heads of q, then of k, then of v: `qkv_proj(x).view(T, -1, D)`. Rows may be
            strided. Fewer or no v heads are fine, and with `num_kv_heads=0` it is a lone q or k.
        cos: (T, R/2) float, R <= D: only the first R entries of a head turn (partial rotary). fp32 recommended.
        sin: (T, R/2), like `cos`; no gradient flows to the tables.
        num_heads: H.
        num_kv_heads: Hkv; None = H.
        interleaved: entries 2i and 2i + 1 of a head turn together (Llama-4's vision, complex numbers); otherwise
            i and i + R/2 ("rotate_half": Qwen-VL, Pixtral in transformers).

    Returns:
        q (T, H, D), k (T, Hkv, D) and v (T, the rest, D) in the dtype of `qkv`; fp32 inside, rounded once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Equal to apply_rotary_pos_emb_vision and apply_multimodal_rotary_pos_emb of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and
    to the vision rotary of Pixtral and Llama-4 (RoFormer, arXiv 2104.09864).
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if qkv.dim() != 3 or num_heads < 1 or kv_heads < 0 or num_heads + kv_heads > qkv.shape[1]:
        raise ValueError(f"fastmllm::vision_rope: qkv {tuple(qkv.shape)} must be (T, heads, D) with at least "
                         f"num_heads {num_heads} + num_kv_heads {kv_heads} heads: view it so")  # fmt: skip
    if cos.shape != sin.shape or cos.dim() != 2 or len(cos) != len(qkv) or 2 * cos.shape[1] > qkv.shape[2]:
        raise ValueError(f"fastmllm::vision_rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be (T, R/2) "
                         f"with R <= D and qkv (T, heads, D), but qkv is {tuple(qkv.shape)}")  # fmt: skip
    if not (qkv.is_floating_point() and cos.is_floating_point()) or cos.dtype != sin.dtype:
        raise ValueError(f"fastmllm::vision_rope: qkv {qkv.dtype}, cos {cos.dtype} and sin {sin.dtype} must be "
                         "floating point, cos and sin alike")  # fmt: skip
    if cos.device != qkv.device or sin.device != qkv.device:
        raise ValueError(f"fastmllm::vision_rope: qkv {tuple(qkv.shape)} is on {qkv.device}, but cos is on "
                         f"{cos.device} and sin on {sin.device}: move the tables once a batch")  # fmt: skip
    copy_values = torch.is_grad_enabled() and qkv.requires_grad
    q, k, v = _vision_rope(qkv, cos.detach(), sin.detach(), num_heads, kv_heads, interleaved, copy_values)
    return q, k, v if copy_values else qkv[:, num_heads + kv_heads :]
