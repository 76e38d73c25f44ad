"""LayerNorm with an optional residual add in front, fp32 statistics (Ba et al., arXiv 1607.06450).

Shapes: M rows (all leading dimensions), N width. `h = x + residual` is returned too: pre-LN blocks need both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import accumulator_dtype, cdiv, device_of, next_power_of_2, tl, triton

MAX_WIDTH = 8192  # a row is held in registers, and the next power of two spills: wider rows go to the reference


# 1. reference ---------------------------------------------------------------------------------------------------------
def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = x if residual is None else x + residual
    acc = accumulator_dtype(x.dtype)
    y, mean, rstd = torch.native_layer_norm(
        h.to(acc), weight.shape, weight.to(acc), None if bias is None else bias.to(acc), eps
    )
    # an operator may not return its input: without a residual, h is not returned
    return y.to(x.dtype), x.new_empty(0) if residual is None else h.contiguous(), mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm_bwd_reference(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc = mean.dtype
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(acc),
        h.to(acc),
        weight.shape,
        mean.unsqueeze(-1),
        rstd.unsqueeze(-1),
        weight.to(acc),
        torch.zeros_like(weight, dtype=acc),
        [True, weight_grad, weight_grad],
    )
    if grad_h is not None:
        dx = dx + grad_h.to(acc)
    if not weight_grad:
        return dx.to(h.dtype), weight.new_empty(0), weight.new_empty(0)
    return dx.to(h.dtype), dw.to(weight.dtype), db.to(weight.dtype)


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _fwd_kernel(
    x_ptr, w_ptr, b_ptr, r_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, M, N, eps,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    offsets = rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    h = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(r_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h_out = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offsets, h_out, mask=mask)
        h = h_out.to(tl.float32)  # normalise what was stored, as the unfused pair does
    mean = tl.sum(h, 1) / N  # (BLOCK_M,)
    centred = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    y = centred * rstd[:, None] * tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def _bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr, M, N,
    HAS_DH: tl.constexpr, WEIGHT_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program walks its share of the rows and keeps its part of dw and db in registers."""
    group = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((BLOCK_N,), tl.float32)
    db = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(group * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # `start` is a Python int in the interpreter
        offsets = rows[:, None] * N + cols[None, :]
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        normed = tl.where(mask, (h - mean[:, None]) * rstd[:, None], 0.0)
        g = dy * w
        dx = (g - tl.sum(g, 1)[:, None] / N - normed * (tl.sum(g * normed, 1)[:, None] / N)) * rstd[:, None]
        if HAS_DH:
            dx += tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if WEIGHT_GRAD:
            dw += tl.sum(dy * normed, 0)
            db += tl.sum(dy, 0)
    if WEIGHT_GRAD:
        tl.store(dw_ptr + group * N + cols, dw, mask=cols < N)
        tl.store(db_ptr + group * N + cols, db, mask=cols < N)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(n: int, dtype: torch.dtype) -> dict[str, int]:
    block_n = next_power_of_2(n)
    return {
        "BLOCK_M": max(1, 2048 // block_n),
        "BLOCK_N": block_n,
        "num_warps": 4 if block_n <= 2048 else 8 if block_n * dtype.itemsize <= 8192 else 16,
    }


def _has_kernel(dtype: torch.dtype, n: int) -> bool:
    return dtype != torch.float64 and n <= MAX_WIDTH


def layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = weight.numel()
    if not _has_kernel(x.dtype, n):
        return layer_norm_reference(x, weight, bias, residual, eps)
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    m = x.numel() // n if n else 0
    y = torch.empty_like(x)
    h = x.new_empty(0) if residual is None else torch.empty_like(x)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    config = _config(n, x.dtype)
    if m:
        with device_of(x):
            _fwd_kernel[(cdiv(m, config["BLOCK_M"]),)](
                x, weight, bias, residual, y, h, mean, rstd, m, n, eps,
                HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, **config,
            )  # fmt: skip
    return y, h, mean, rstd


def layer_norm_bwd_triton(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = weight.numel()
    if not _has_kernel(h.dtype, n):
        return layer_norm_bwd_reference(grad_y, grad_h, h, weight, mean, rstd, weight_grad)
    grad_y, h, weight = grad_y.contiguous(), h.contiguous(), weight.contiguous()
    grad_h = None if grad_h is None else grad_h.contiguous()
    m = h.numel() // n if n else 0
    config = _config(n, h.dtype)
    groups = max(1, min(cdiv(m, config["BLOCK_M"] * 4), 264))  # two programs an SM of the largest part (132)
    dx = torch.empty_like(h)
    partial = h.new_empty((2, groups if weight_grad else 0, n), dtype=torch.float32)
    if m:
        with device_of(h):
            _bwd_kernel[(groups,)](
                grad_y, grad_h, h, weight, mean.contiguous(), rstd.contiguous(), dx, partial[0], partial[1], m, n,
                HAS_DH=grad_h is not None, WEIGHT_GRAD=weight_grad, **config,
            )  # fmt: skip
    elif weight_grad:
        partial.zero_()
    if not weight_grad:
        return dx, weight.new_empty(0), weight.new_empty(0)
    dw, db = partial.sum(1).to(weight.dtype)
    return dx, dw, db.clone()  # two outputs may not share storage


# 4. operator ----------------------------------------------------------------------------------------------------------
_layer_norm = torch.library.custom_op(
    "fastmllm::layer_norm",
    layer_norm_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
_layer_norm.register_kernel("cuda")(layer_norm_triton)

_layer_norm_bwd = torch.library.custom_op(
    "fastmllm::layer_norm_bwd",
    layer_norm_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor mean, Tensor rstd, bool weight_grad)"
    " -> (Tensor, Tensor, Tensor)",
)
_layer_norm_bwd.register_kernel("cuda")(layer_norm_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_layer_norm.register_fake
def _(x, weight, bias, residual, eps):
    stats = x.new_empty(x.shape[:-1], dtype=accumulator_dtype(x.dtype))
    h = x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format), h, stats, torch.empty_like(stats)


@_layer_norm_bwd.register_fake
def _(grad_y, grad_h, h, weight, mean, rstd, weight_grad):
    dw = torch.empty_like(weight) if weight_grad else weight.new_empty(0)
    return torch.empty_like(h, memory_format=torch.contiguous_format), dw, torch.empty_like(dw)


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, _ = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_h, _grad_mean, _grad_rstd):
    h, weight, mean, rstd = ctx.saved_tensors
    if grad_y is None and grad_h is None:
        return None, None, None, None, None
    grad_y = torch.zeros_like(h) if grad_y is None else grad_y.contiguous()
    grad_h = grad_h.contiguous() if ctx.has_residual and grad_h is not None else None
    weight_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dw, db = _layer_norm_bwd(grad_y, grad_h, h, weight, mean, rstd, weight_grad)
    return (
        dx,
        dw if ctx.needs_input_grad[1] else None,
        db if ctx.has_bias and ctx.needs_input_grad[2] else None,
        dx if ctx.has_residual else None,
        None,
    )


_layer_norm.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension of `x`, or of `x + residual`.

    Args:
        x: (..., N) float tensor.
        weight: (N,) scale.
        bias: (N,) shift, or None.
        residual: (..., N) added to `x` before the norm, or None.
        eps: added to the variance.

    Returns:
        y (..., N) in the dtype of `x`; with a residual, the pair (y, x + residual).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Equal to torch.nn.functional.layer_norm (Ba et al., arXiv 1607.06450).
    """
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != weight.numel():
        raise ValueError(f"fastmllm::layer_norm: weight {tuple(weight.shape)} must be (N,) with x (..., N), "
                         f"but x is {tuple(x.shape)}")  # fmt: skip
    if bias is not None and (bias.shape != weight.shape or bias.dtype != weight.dtype):
        raise ValueError(f"fastmllm::layer_norm: bias {tuple(bias.shape)} {bias.dtype} and weight "
                         f"{tuple(weight.shape)} {weight.dtype} differ")  # fmt: skip
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"fastmllm::layer_norm: x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} "
                         f"{residual.dtype} differ")  # fmt: skip
    if not x.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"fastmllm::layer_norm: x {x.dtype} and weight {weight.dtype} must be floating point")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"fastmllm::layer_norm: x {tuple(x.shape)} is on {x.device}, but {name} "
                             f"{tuple(tensor.shape)} is on {tensor.device}: move one of them")  # fmt: skip
    y, h, _, _ = _layer_norm(x, weight, bias, residual, eps)
    return y if residual is None else (y, h)
