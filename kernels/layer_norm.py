"""LayerNorm with an optional residual add and LayerScale in front, fp32 statistics (Ba et al., arXiv 1607.06450).

Shapes: M rows (all leading dimensions), N width. `h = residual + scale * x` is returned too: pre-LN blocks need both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._norm import add_bwd_reference, add_reference, backward_triton, check, forward_triton, has_bwd_kernel, has_kernel
from ._triton import accumulator_dtype


# 1. reference ---------------------------------------------------------------------------------------------------------
def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = add_reference(x, residual, scale)
    acc = accumulator_dtype(x.dtype)
    rows = h.dtype if h.device.type == "cpu" else acc  # torch's CPU kernel takes bf16 rows with fp32 weights: no copy
    y, mean, rstd = torch.native_layer_norm(
        h.to(rows), weight.shape, weight.to(acc), None if bias is None else bias.to(acc), eps
    )
    # an operator may not return its input: without a residual, h is not returned
    return y.to(x.dtype), x.new_empty(0) if residual is None else h, mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm_bwd_reference(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = mean.dtype
    # as in the forward; but where dh is not stored yet, it is not rounded yet
    rows = h.dtype if h.device.type == "cpu" and grad_h is None and scale is None else acc
    dh, dw, db = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(rows),
        h.to(rows),
        weight.shape,
        mean.unsqueeze(-1),
        rstd.unsqueeze(-1),
        weight.to(acc),
        torch.zeros_like(weight, dtype=acc),
        [True, weight_grad, bias_grad],
    )
    dh, dx, dscale = add_bwd_reference(dh, grad_h, x, scale, h.dtype)
    dw = dw.to(weight.dtype) if weight_grad else weight.new_empty(0)
    return dh, dx, dw, db.to(weight.dtype) if bias_grad else weight.new_empty(0), dscale


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
# The functions under @triton.jit are in _norm.py: rms_norm runs the same ones without the mean.


# 3. launchers ---------------------------------------------------------------------------------------------------------
def layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not has_kernel(x.dtype, weight.numel()):
        return layer_norm_reference(x, weight, bias, residual, scale, eps)
    return forward_triton(x, weight, bias, residual, scale, eps, 0.0, True)


def layer_norm_bwd_triton(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not has_bwd_kernel(h.dtype, weight.numel(), scale):
        return layer_norm_bwd_reference(grad_y, grad_h, h, x, weight, scale, mean, rstd, weight_grad, bias_grad)
    return backward_triton(grad_y, grad_h, h, x, weight, scale, mean, rstd, 0.0, weight_grad, bias_grad)


# 4. operator ----------------------------------------------------------------------------------------------------------
_layer_norm = torch.library.custom_op(
    "fastmllm::layer_norm",
    layer_norm_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
_layer_norm.register_kernel("cuda")(layer_norm_triton)

_layer_norm_bwd = torch.library.custom_op(
    "fastmllm::layer_norm_bwd",
    layer_norm_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor? x, Tensor weight, Tensor? scale, Tensor mean, "
    "Tensor rstd, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_layer_norm_bwd.register_kernel("cuda")(layer_norm_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_layer_norm.register_fake
def _(x, weight, bias, residual, scale, eps):
    stats = x.new_empty(x.shape[:-1], dtype=accumulator_dtype(x.dtype))
    h = x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format), h, stats, torch.empty_like(stats)


@_layer_norm_bwd.register_fake
def _(grad_y, grad_h, h, x, weight, scale, mean, rstd, weight_grad, bias_grad):
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    dx = h.new_empty(0) if scale is None else torch.empty_like(dh)
    dw, db, dscale = (weight.new_empty(weight.shape if w else (0,)) for w in (weight_grad, bias_grad, x is not None))
    return dh, dx, dw, db, dscale


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    x, weight, _, residual, scale, _ = inputs
    _, h, mean, rstd = output
    # x is kept only for the gradient of scale, and scale only for that of x
    of_x, of_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    ctx.save_for_backward(
        x if residual is None else h,
        x if of_scale else None,
        weight,
        scale if of_x or of_scale else None,
        mean,
        rstd,
    )
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_residual, ctx.has_scale = residual is not None, scale is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_h, _grad_mean, _grad_rstd):
    h, x, weight, scale, mean, rstd = ctx.saved_tensors
    of_x, of_weight, of_bias, of_residual, of_scale, _ = ctx.needs_input_grad
    if grad_y is None and grad_h is None:
        return None, None, None, None, None, None
    grad_y = torch.zeros_like(h) if grad_y is None else grad_y.contiguous()
    grad_h = grad_h.contiguous() if ctx.has_residual and grad_h is not None else None
    dh, dx, dw, db, dscale = _layer_norm_bwd(grad_y, grad_h, h, x, weight, scale, mean, rstd, of_weight, of_bias)
    return (
        (dx if ctx.has_scale else dh) if of_x else None,
        dw if of_weight else None,
        db if of_bias else None,
        dh if of_residual else None,
        dscale if of_scale else None,
        None,
    )


_layer_norm.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension of `x`, or of `residual + scale * x`.

    Args:
        x: (..., N) float tensor.
        weight: (N,) scale.
        bias: (N,) shift, or None.
        residual: (..., N) to which `x` is added before the norm, or None.
        eps: added to the variance.
        scale: (N,) LayerScale (arXiv 2103.17239) on `x`, or None; needs a residual.

    Returns:
        y (..., N) in the dtype of `x`; with a residual, the pair (y, residual + scale * x).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Equal to torch.nn.functional.layer_norm (Ba et al., arXiv 1607.06450); with `scale`, to the residual stream of
    DINOv2 and InternViT.
    """
    check("layer_norm", x, weight, bias, residual, scale)
    y, h, _, _ = _layer_norm(x, weight, bias, residual, scale, eps)
    return y if residual is None else (y, h)
