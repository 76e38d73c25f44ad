"""What layer_norm and rms_norm share: the kernels and launchers, the sum in front, the checks of arguments.

Shapes: M rows (all leading dimensions), N width.

    h = residual + scale * x                       rounded: what is stored is normalised
    y = (h - mean) * rstd * (offset + weight) + bias
    dh = (g - mean(g) - normed * mean(g * normed)) * rstd + grad_h     with g = grad_y * (offset + weight)
    dx = scale * dh,  dscale = sum over rows of x * dh

RMSNorm has no mean and no bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import cdiv, device_of, next_power_of_2, tl, triton

MAX_WIDTH = 8192  # a row is held in registers, and the next power of two spills: wider rows go to the reference
MAX_SCALED_WIDTH = 4096  # of a backward with LayerScale: it holds one row more


# The sum in front, in plain torch -------------------------------------------------------------------------------------
def add_reference(x: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
    """Return x, or residual + scale * x: fp32 inside, rounded once."""
    if residual is None:
        return x
    if scale is None:
        return (x + residual).contiguous()
    return torch.addcmul(residual, x, scale).to(x.dtype).contiguous()


def add_bwd_reference(
    dh: Tensor, grad_h: Tensor | None, x: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of h (with `grad_h` added), x (empty without a scale) and scale (empty without x)."""
    if grad_h is not None:
        dh = dh + grad_h.to(dh.dtype)
    empty = dh.new_empty(0, dtype=dtype)
    dx = empty if scale is None else (dh * scale.to(dh.dtype)).to(dtype)
    dscale = empty.clone()
    if x is not None and scale is not None:
        dscale = (dh * x.to(dh.dtype)).flatten(0, -2).sum(0).to(scale.dtype)
    return dh.to(dtype), dx, dscale


# Triton kernels -------------------------------------------------------------------------------------------------------
@triton.jit
def _fwd_kernel(
    x_ptr, w_ptr, b_ptr, r_ptr, s_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, M, N, eps, offset, CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    offsets = rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    h = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        h *= tl.load(s_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        h += tl.load(r_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h_out = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offsets, h_out, mask=mask)
        h = h_out.to(tl.float32)  # normalise what was stored, as the unfused pair does
    if CENTRED:
        mean = tl.sum(h, 1) / N  # (BLOCK_M,)
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        h = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(h * h, 1) / N + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset
    y = h * rstd[:, None] * w[None, :]
    if HAS_BIAS:
        y += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, x_ptr, w_ptr, s_ptr, mean_ptr, rstd_ptr, out_ptr, dx_ptr, dw_ptr, db_ptr, ds_ptr, M, N,
    offset, CENTRED: tl.constexpr, HAS_DH: tl.constexpr, HAS_SCALE: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr, SCALE_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program walks its share of the rows and keeps its part of dw, db and dscale in registers."""
    group = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    w = (tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset)[None, :]
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ds = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(group * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # `start` is a Python int in the interpreter
        offsets = rows[:, None] * N + cols[None, :]
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        if CENTRED:
            mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
            h = tl.where(mask, h - mean[:, None], 0.0)
        normed = h * rstd
        g = dy * w
        dh = g - normed * (tl.sum(g * normed, 1)[:, None] / N)
        if CENTRED:
            dh -= tl.sum(g, 1)[:, None] / N
        dh *= rstd
        if HAS_DH:
            dh += tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, dh.to(out_ptr.dtype.element_ty), mask=mask)
        if WEIGHT_GRAD:
            dw += dy * normed
        if BIAS_GRAD:
            db += dy
        if SCALE_GRAD:  # masked columns of dh are not zero where the rows have a mean, but those of x are
            ds += dh * tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            s = tl.load(s_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
            tl.store(dx_ptr + offsets, (dh * s).to(dx_ptr.dtype.element_ty), mask=mask)
    at = group * N + cols
    if WEIGHT_GRAD:
        tl.store(dw_ptr + at, tl.sum(dw, 0), mask=cols < N)
    if BIAS_GRAD:
        tl.store(db_ptr + at, tl.sum(db, 0), mask=cols < N)
    if SCALE_GRAD:
        tl.store(ds_ptr + at, tl.sum(ds, 0), mask=cols < N)


# Launchers ------------------------------------------------------------------------------------------------------------
def _config(n: int, dtype: torch.dtype) -> dict[str, int]:
    block_n = next_power_of_2(n)
    return {
        "BLOCK_M": max(1, 2048 // block_n),
        "BLOCK_N": block_n,
        "num_warps": 4 if block_n <= 2048 else 8 if block_n * dtype.itemsize <= 8192 else 16,
    }


def has_kernel(dtype: torch.dtype, n: int, max_width: int = MAX_WIDTH) -> bool:
    return dtype != torch.float64 and n <= max_width


def has_bwd_kernel(dtype: torch.dtype, n: int, scale: Tensor | None) -> bool:
    return has_kernel(dtype, n, MAX_WIDTH if scale is None else MAX_SCALED_WIDTH)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def forward_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, h (empty without a residual), mean (empty if not `centred`) and rstd."""
    n = weight.numel()
    x, weight = x.contiguous(), weight.contiguous()
    bias, residual, scale = _contiguous(bias, residual, scale)
    m = x.numel() // n if n else 0
    y = torch.empty_like(x)
    h = x.new_empty(0) if residual is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else rstd.new_empty(0)
    config = _config(n, x.dtype)
    if m:
        with device_of(x):
            _fwd_kernel[(cdiv(m, config["BLOCK_M"]),)](
                x, weight, bias, residual, scale, y, h, mean, rstd, m, n, eps, offset, CENTRED=centred,
                HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, HAS_SCALE=scale is not None, **config,
            )  # fmt: skip
    return y, h, mean, rstd


def backward_triton(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of h, x (empty without a scale), weight, bias and scale (empty without x)."""
    n = weight.numel()
    grad_y, h, weight, rstd = grad_y.contiguous(), h.contiguous(), weight.contiguous(), rstd.contiguous()
    grad_h, x, scale, mean = _contiguous(grad_h, x, scale, mean)
    m = h.numel() // n if n else 0
    config = _config(n, h.dtype)
    # 16 warps an SM of the largest part (132): enough loads under way, few enough partial sums
    groups = max(1, min(cdiv(m, config["BLOCK_M"] * 4), 132 * 16 // config["num_warps"]))
    dh = torch.empty_like(h)
    dx = h.new_empty(0) if scale is None else torch.empty_like(h)
    wanted = weight_grad, bias_grad, x is not None
    partial = h.new_empty((sum(wanted), groups, n), dtype=torch.float32)
    slots = iter(partial)
    parts = [next(slots) if w else None for w in wanted]
    if m:
        with device_of(h):
            _bwd_kernel[(groups,)](
                grad_y, grad_h, h, x, weight, scale, mean, rstd, dh, dx, *parts, m, n, offset,
                CENTRED=mean is not None, HAS_DH=grad_h is not None, HAS_SCALE=scale is not None,
                WEIGHT_GRAD=weight_grad, BIAS_GRAD=bias_grad, SCALE_GRAD=x is not None, **config,
            )  # fmt: skip
    else:
        partial.zero_()
    sums = iter(partial.sum(1) if any(wanted) else ())
    # a copy each: outputs may not share storage
    dw, db, dscale = (next(sums).to(weight.dtype, copy=True) if w else weight.new_empty(0) for w in wanted)
    return dh, dx, dw, db, dscale


# Arguments ------------------------------------------------------------------------------------------------------------
def check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None
) -> None:
    """Raise ValueError where shapes, dtypes or devices do not fit together."""
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != weight.numel():
        raise ValueError(f"fastmllm::{op}: weight {tuple(weight.shape)} must be (N,) with x (..., N), "
                         f"but x is {tuple(x.shape)}")  # fmt: skip
    for name, tensor in (("bias", bias), ("scale", scale)):
        if tensor is not None and (tensor.shape != weight.shape or tensor.dtype != weight.dtype):
            raise ValueError(f"fastmllm::{op}: {name} {tuple(tensor.shape)} {tensor.dtype} and weight "
                             f"{tuple(weight.shape)} {weight.dtype} differ")  # fmt: skip
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"fastmllm::{op}: x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} "
                         f"{residual.dtype} differ")  # fmt: skip
    if scale is not None and residual is None:
        raise ValueError(f"fastmllm::{op}: scale {tuple(scale.shape)} multiplies x before it is added to a residual: "
                         "give the residual, or fold the scale into what made x")  # fmt: skip
    if not x.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"fastmllm::{op}: x {x.dtype} and weight {weight.dtype} must be floating point")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual), ("scale", scale)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"fastmllm::{op}: x {tuple(x.shape)} is on {x.device}, but {name} "
                             f"{tuple(tensor.shape)} is on {tensor.device}: move one of them")  # fmt: skip
