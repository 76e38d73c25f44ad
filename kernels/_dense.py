"""Dense attention with its log-sum-exp, forward and backward: what the references of the attention operators call.

Tensors are (B, H, L, D), keys and values with the Hkv heads that divide H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._triton import accumulator_dtype

SHORT = 192  # up to here torch's CPU backward is 2 to 7 times faster when bf16 is widened to fp32 first


def rows_contiguous(t: Tensor) -> Tensor:
    """Return `t` with unit stride in the head dimension: slices of a packed QKV are taken as they are."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _fused(q: Tensor) -> bool:
    """Tell whether torch has its fused kernel for `q`: GQA, every dtype, and it returns the log-sum-exp."""
    return q.device.type == "cpu"


def dense_fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if _fused(q):
        length, packed = q.shape[2], _worth_grouping(k, causal, mask)
        q = _group(q, k) if packed else q
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return (_ungroup(out, length), _ungroup(lse, length)) if packed else (out, lse)
    scores = _scores(q, k, causal, mask, scale)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ _repeat(v, q).to(scores.dtype)).to(q.dtype), lse


def dense_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _fused(q):
        dtype = q.dtype
        if dtype in (torch.bfloat16, torch.float16) and q.shape[2] <= SHORT and k.shape[2] <= SHORT:
            grad, q, k, v, out = (t.float() for t in (grad, q, k, v, out))
            mask = None if mask is None else mask.float()
        length, packed = q.shape[2], _worth_grouping(k, causal, mask)
        if packed:
            grad, q, out, lse = (_group(t, k) for t in (grad, q, out, lse))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        return (_ungroup(dq, length) if packed else dq).to(dtype), dk.to(dtype), dv.to(dtype)
    p = (_scores(q, k, causal, mask, scale) - lse[..., None]).exp()
    grad = grad.to(p.dtype)
    delta = (grad * out.to(p.dtype)).sum(-1, keepdim=True)
    ds = p * (grad @ _repeat(v, q).to(p.dtype).mT - delta) * scale
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    dk = (ds.mT @ q.to(p.dtype)).unflatten(1, heads).sum(2)
    dv = (p.mT @ grad).unflatten(1, heads).sum(2)
    return (ds @ _repeat(k, q).to(p.dtype)).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _worth_grouping(k: Tensor, causal: bool, mask: Tensor | None) -> bool:
    return not causal and mask is None and k.shape[2] > SHORT  # over a few keys, turning costs as much


def _group(t: Tensor, k: Tensor) -> Tensor:
    """Turn query heads of one key head (B, H, L, ...) into rows (B, Hkv, H / Hkv * L, ...): keys are read once for all.

    A bf16 row that decodes over 6404 keys, 4 heads to one, takes a tenth of the time; hundreds of rows 0.9 of it.
    """
    return t if t.shape[1] == k.shape[1] else t.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _ungroup(t: Tensor, length: int) -> Tensor:
    """Turn rows (B, Hkv, H / Hkv * L, ...) back into heads (B, H, L, ...)."""
    return t if t.shape[2] == length else t.unflatten(2, (-1, length)).flatten(1, 2)


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
