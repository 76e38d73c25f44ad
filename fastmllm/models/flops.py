"""Floating point operations of layers and of fastmllm's operators: every count in the package comes from here.

Only matrix products and convolutions count, a multiply-add as two; norms, activations and reductions do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.models.eva import Attention as EvaAttention
from fastmllm.modules.depthwise_conv import DepthwiseConv
from fastmllm.modules.lm_head import LMHead

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, DepthwiseConv)


# Layers ---------------------------------------------------------------------------------------------------------------
def product_weight(module: nn.Module) -> Tensor | None:
    """Return the weight that a module's own call multiplies its input with; None where it has no such product."""
    if isinstance(module, PRODUCTS):
        return module.weight
    return module.qkv_weight if isinstance(module, EvaAttention) else None


def product_flops(module: nn.Module) -> Callable[[Tensor], int]:
    """Return what counts a call's product by its output; made while the weight is whole (ZeRO-3 takes it away).

    Args:
        module: one with a `product_weight`.
    """
    weight = product_weight(module)
    assert weight is not None
    # of EVA's product q, k and v come out, of its module values of one's width
    each = 2 * (len(weight) if isinstance(module, EvaAttention) else weight[0].numel())
    if isinstance(module, LMHead):  # asked for a loss, (T,) or less, its product is the loss operator's
        return lambda out: each * out.numel() * (out.ndim > 1)
    return lambda out: each * out.numel()


# Attention ------------------------------------------------------------------------------------------------------------
def segment_pairs(cu_q: Tensor, cu_k: Tensor, causal: bool) -> Tensor:
    """Return, as a scalar int64 on their device, the (query, key) pairs of packed segments; causal ones below the edge.

    Args:
        cu_q, cu_k: (S + 1,) boundaries.
        causal: bottom-right aligned, as in `fastmllm::attention`.
    """
    m, n = cu_q.long().diff(), cu_k.long().diff()
    both = torch.minimum(m, n)
    return (m * n - both * (both - 1) // 2 if causal else m * n).sum()


def range_pairs(start: Tensor, stop: Tensor, num_keys: int) -> Tensor:
    """Return, as a scalar int64 on their device, how many keys the rows of a cross-attention see together."""
    return (stop.long().clamp(max=num_keys) - start.long().clamp(min=0)).clamp(min=0).sum()


def attention_flops(q: Tensor, pairs: int) -> int:
    """Return the operations of q k^T and p v over pairs of a query and a key; q is (T, H, D)."""
    return 4 * q.shape[1] * q.shape[2] * pairs


def attention_backward(query_grad: bool, key_grad: bool) -> tuple[float, float]:
    """Return the backward pass of attention in forward passes: what the gradients need, and what is computed for it.

    Needed are dp and dq for the queries, dp, dk and dv for keys and values: two products each are a forward pass.
    q k^T is computed a second time besides.
    """
    products = query_grad + 2 * key_grad + (query_grad or key_grad)
    return products / 2, (products + (query_grad or key_grad)) / 2


# Operators, for torch.utils.flop_counter ------------------------------------------------------------------------------
def _attention(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, *args, out_val=None, **kwargs) -> int:
    return attention_flops(q, int(segment_pairs(cu_q, cu_k, causal)))


def _attention_bwd(
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale, key_bias=None, query_grad=True, key_grad=True,
    **kwargs,
) -> int:  # fmt: skip
    flops = attention_flops(q, int(segment_pairs(cu_q, cu_k, causal)))
    return int(attention_backward(query_grad, key_grad)[1] * flops)


def _cross_attention(q, k, v, start, stop, *args, **kwargs) -> int:
    return attention_flops(q, int(range_pairs(start, stop, len(k))))


def _cross_attention_bwd(
    grad, q, k, v, out, lse, start, stop, max_q, max_k, scale, query_grad, key_grad, **kwargs
) -> int:
    flops = attention_flops(q, int(range_pairs(start, stop, len(k))))
    return int(attention_backward(query_grad, key_grad)[1] * flops)


def _patch_embed(pixels, weight, *args, **kwargs) -> int:
    return 2 * pixels.numel() * weight.shape[1]


def _patch_embed_bwd(grad, pixels, weight, patch_size, pixel_grad, weight_grad, *args, **kwargs) -> int:
    return 2 * pixels.numel() * weight.shape[1] * (bool(pixel_grad) + bool(weight_grad))


def _scored(labels: Tensor, ignore_index: int, num_targets: int | None) -> int:
    return int((labels != ignore_index).sum()) if num_targets is None else num_targets


def _loss(hidden, weight, labels, ignore_index, num_targets, reduce, hidden_grad, keep=False, **kwargs) -> int:
    return 2 * _scored(labels, ignore_index, num_targets) * weight.numel() * (2 if hidden_grad else 1)


def _loss_bwd(
    grad, hidden, weight, labels, lse, ignore_index, num_targets, hidden_grad, weight_grad, kept=None, **kwargs
) -> int:
    again = kept is None or not kept.numel()
    products = bool(hidden_grad) + bool(weight_grad) + again
    return 2 * _scored(labels, ignore_index, num_targets) * weight.numel() * products


def _gelu_mlp(x, weight1, bias1, weight2, *args, **kwargs) -> int:
    return 2 * x.numel() // x.shape[-1] * (weight1.numel() + weight2.numel())


def _gelu_mlp_bwd(grad, x, hidden, weight1, bias1, weight2, approximate, needs, **kwargs) -> int:
    rows = grad.numel() // grad.shape[-1]
    return 2 * rows * ((any(needs[:3]) + needs[3]) * weight2.numel() + (needs[0] + needs[1]) * weight1.numel())


def _attention_scores(
    q, k, lse, cu_q, cu_k, max_k, causal, scale, reduce, row_start, row_stop, row_weight, key_bias, **kwargs
) -> int:
    if row_start is None:
        return attention_flops(q, int(segment_pairs(cu_q, cu_k, causal))) // 2  # q k^T alone
    rows = (row_stop.long() - row_start.long()).clamp(min=0)
    return 2 * q.shape[1] * q.shape[2] * int((rows * cu_k.long().diff()).sum())


def _token_merge(x, metric, size, cu_seqlens, removed, max_seqlen, protected, **kwargs) -> int:
    half = (cu_seqlens.long().diff() - protected).clamp(min=0) // 2  # every second token is matched with the others
    return 2 * metric.shape[1] * int((half * half).sum())


def _greedy_diverse(tokens, cu_seqlens, relevance, budget, k, total, max_seqlen, method, in_order, **kwargs) -> int:
    lengths = cu_seqlens.long().diff()
    if method in ("max_min", "coverage"):  # every pair's cosine
        return 2 * tokens.shape[1] * int((lengths * lengths).sum())
    picked = torch.full_like(lengths, k) if budget is None else budget.long()
    # a row of cosines a pick, and its product with the Cholesky rows so far
    return int((2 * tokens.shape[1] * picked * lengths + picked * (picked - 1) * lengths).sum())


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Return what the operators of fastmllm compute, by operator; each reads the tensors themselves."""
    table: dict[str, Callable[..., int]] = {
        "attention": _attention,
        "attention_bwd": _attention_bwd,
        "cross_attention": _cross_attention,
        "cross_attention_bwd": _cross_attention_bwd,
        "patch_embed": _patch_embed,
        "patch_embed_bwd": _patch_embed_bwd,
        "gelu_mlp": _gelu_mlp,
        "gelu_mlp_bwd": _gelu_mlp_bwd,
        "attention_scores": _attention_scores,
        "token_merge": _token_merge,
        "greedy_diverse": _greedy_diverse,
        "linear_cross_entropy": _loss,
        "linear_cross_entropy_bwd": _loss_bwd,
    }
    found: dict[Any, Callable[..., int]] = {}
    for name, formula in table.items():
        if hasattr(torch.ops.fastmllm, name):
            # FlopCounterMode passes shapes unless told that the formula reads the tensors
            formula._get_raw = True  # type: ignore[attr-defined]
            found[getattr(torch.ops.fastmllm, name)] = formula
    return found
