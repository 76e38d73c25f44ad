"""RMSNorm with an optional residual add and LayerScale in front, fp32 statistics (Zhang, Sennrich, arXiv 1910.07467).

Shapes: M rows (all leading dimensions), N width. `h = residual + scale * x` is returned too: pre-norm blocks need both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native  # noqa: F401 - its C++ implementation registers itself
from ._norm import add_bwd_reference, add_reference, backward_triton, check, forward_triton, has_bwd_kernel, has_kernel
from ._triton import accumulator_dtype


# 1. reference ---------------------------------------------------------------------------------------------------------
def rms_norm_reference(
    x: Tensor, weight: Tensor, residual: Tensor | None, scale: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    h = add_reference(x, residual, scale)
    acc = accumulator_dtype(x.dtype)
    wide = h.to(acc)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd.unsqueeze(-1) * (weight.to(acc) + offset)).to(x.dtype).contiguous()
    # an operator may not return its input: without a residual, h is not returned
    return y, x.new_empty(0) if residual is None else h, rstd.contiguous()


def rms_norm_bwd_reference(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = rstd.dtype
    normed = h.to(acc) * rstd.unsqueeze(-1)
    g = grad_y.to(acc) * (weight.to(acc) + offset)
    dh = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    dh, dx, dscale = add_bwd_reference(dh, grad_h, x, scale, h.dtype)
    if not weight_grad:
        return dh, dx, weight.new_empty(0), dscale
    return dh, dx, (grad_y.to(acc) * normed).flatten(0, -2).sum(0).to(weight.dtype), dscale


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
# The functions under @triton.jit are in _norm.py: layer_norm runs the same ones with a mean.


# 3. launchers ---------------------------------------------------------------------------------------------------------
def rms_norm_triton(
    x: Tensor, weight: Tensor, residual: Tensor | None, scale: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not has_kernel(x.dtype, weight.numel()):
        return rms_norm_reference(x, weight, residual, scale, eps, offset)
    y, h, _, rstd = forward_triton(x, weight, None, residual, scale, eps, offset, False)
    return y, h, rstd


def rms_norm_bwd_triton(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not has_bwd_kernel(h.dtype, weight.numel(), scale):
        return rms_norm_bwd_reference(grad_y, grad_h, h, x, weight, scale, rstd, offset, weight_grad)
    dh, dx, dw, _, dscale = backward_triton(grad_y, grad_h, h, x, weight, scale, None, rstd, offset, weight_grad, False)
    return dh, dx, dw, dscale


# 4. operator ----------------------------------------------------------------------------------------------------------
_rms_norm = torch.library.custom_op(
    "fastmllm::rms_norm",
    rms_norm_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? residual, Tensor? scale, float eps, float offset)"
    " -> (Tensor, Tensor, Tensor)",
)
_rms_norm.register_kernel("cuda")(rms_norm_triton)

_rms_norm_bwd = torch.library.custom_op(
    "fastmllm::rms_norm_bwd",
    rms_norm_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor? x, Tensor weight, Tensor? scale, Tensor rstd, "
    "float offset, bool weight_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)
_rms_norm_bwd.register_kernel("cuda")(rms_norm_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_rms_norm.register_fake
def _(x, weight, residual, scale, eps, offset):
    rstd = x.new_empty(x.shape[:-1], dtype=accumulator_dtype(x.dtype))
    h = x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format), h, rstd


@_rms_norm_bwd.register_fake
def _(grad_y, grad_h, h, x, weight, scale, rstd, offset, weight_grad):
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    dx = h.new_empty(0) if scale is None else torch.empty_like(dh)
    dw, dscale = (weight.new_empty(weight.shape if w else (0,)) for w in (weight_grad, x is not None))
    return dh, dx, dw, dscale


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    x, weight, residual, scale, _, ctx.offset = inputs
    _, h, rstd = output
    # x is kept only for the gradient of scale, and scale only for that of x
    of_x, of_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    ctx.save_for_backward(
        x if residual is None else h, x if of_scale else None, weight, scale if of_x or of_scale else None, rstd
    )
    ctx.mark_non_differentiable(rstd)
    ctx.has_residual, ctx.has_scale = residual is not None, scale is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_h, _grad_rstd):
    h, x, weight, scale, rstd = ctx.saved_tensors
    of_x, of_weight, of_residual, of_scale, _, _ = ctx.needs_input_grad
    if grad_y is None and grad_h is None:
        return None, None, None, None, None, None
    grad_y = torch.zeros_like(h) if grad_y is None else grad_y.contiguous()
    grad_h = grad_h.contiguous() if ctx.has_residual and grad_h is not None else None
    dh, dx, dw, dscale = _rms_norm_bwd(grad_y, grad_h, h, x, weight, scale, rstd, ctx.offset, of_weight)
    return (
        (dx if ctx.has_scale else dh) if of_x else None,
        dw if of_weight else None,
        dh if of_residual else None,
        dscale if of_scale else None,
        None,
        None,
    )


_rms_norm.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale the last dimension of `x`, or of `residual + scale * x`, to unit mean square.

    Args:
        x: (..., N) float tensor.
        weight: (N,) scale.
        residual: (..., N) to which `x` is added before the norm, or None.
        eps: added to the mean square.
        scale: (N,) LayerScale on `x` (arXiv 2103.17239), or None; needs a residual.
        offset: added to the weight: 1 for Gemma, whose weights are stored around 0.

    Returns:
        y (..., N) in the dtype of `x`; with a residual, the pair (y, residual + scale * x).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Equal to torch.nn.functional.rms_norm (Zhang and Sennrich, arXiv 1910.07467), and so to the norms of Llama, Qwen and
    the vision tower of Qwen2.5-VL; with `offset=1` to Gemma's.
    """
    check("rms_norm", x, weight, None, residual, scale)
    y, h, _ = _rms_norm(x, weight, residual, scale, eps, float(offset))
    return y if residual is None else (y, h)
