"""x + tanh(gate) * branch, with the norm behind it: Flamingo (arXiv 2204.14198) and Llama-3.2-Vision add branches so.

Shapes: M rows (all leading dimensions), D width; the gate is one number (1,) or one a channel (D,). A gate of 0 leaves
x as it is, so a new branch starts as the identity. With a norm, the sum `h` is returned too: pre-norm blocks need both.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ._triton import accumulator_dtype, cdiv, device_of, next_power_of_2, tl, triton

MAX_WIDTH = 8192  # a row is held in registers, and the next power of two spills: wider rows go to the reference
MAX_WIDTH_NARROW = (
    4096  # the same for the norm's backward in fp32, of LayerNorm, or with a gate a channel: it holds more
)


# 1. reference ---------------------------------------------------------------------------------------------------------
def gated_residual_reference(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, branch, _opened(gate, x.dtype))  # one pass, fp32 inside also for bf16


def gated_residual_bwd_reference(
    grad: Tensor, branch: Tensor, gate: Tensor, branch_grad: bool, gate_grad: bool
) -> tuple[Tensor, Tensor]:
    dbranch = grad * _opened(gate, grad.dtype) if branch_grad else branch.new_empty(0)
    if not gate_grad:
        return dbranch, gate.new_empty(0)
    acc = accumulator_dtype(grad.dtype)
    product = grad * branch.to(acc)  # in fp16 it would overflow
    total = (
        product.sum(dtype=acc).reshape(1) if gate.numel() == 1 else product.reshape(-1, gate.numel()).sum(0, dtype=acc)
    )
    return dbranch, (total * (1 - _opened(gate, acc).square())).to(gate.dtype)


def gated_residual_norm_reference(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, centred: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = gated_residual_reference(x, branch, gate)
    acc = accumulator_dtype(x.dtype)
    wide, scale = h.to(acc), weight.to(acc)
    if centred:
        shift = None if bias is None else bias.to(acc)
        y, mean, rstd = torch.native_layer_norm(wide, weight.shape, scale, shift, eps)
        return h, y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd * scale
    if bias is not None:
        y = y + bias.to(acc)
    return h, y.to(x.dtype), rstd.new_empty(0), rstd.squeeze(-1)


def gated_residual_norm_bwd_reference(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, mean: Tensor,
    rstd: Tensor, centred: bool, x_grad: bool, branch_grad: bool, gate_grad: bool, weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    acc = rstd.dtype
    grad, wide, scale = grad_y.to(acc), h.to(acc), weight.to(acc)
    if centred:
        wanted = [True, weight_grad, bias_grad]
        dh, dw, db = torch.ops.aten.native_layer_norm_backward(
            grad, wide, weight.shape, mean[..., None], rstd[..., None], scale, torch.zeros_like(scale), wanted
        )
    else:
        normed = wide * rstd[..., None]
        g = grad * scale
        dh = torch.addcmul(g, normed, (g * normed).mean(-1, keepdim=True), value=-1) * rstd[..., None]
        dw = (grad * normed).reshape(-1, weight.numel()).sum(0) if weight_grad else None
        db = grad.reshape(-1, weight.numel()).sum(0) if bias_grad else None
    dw = dw.to(weight.dtype) if weight_grad else weight.new_empty(0)
    db = db.to(weight.dtype) if bias_grad else weight.new_empty(0)
    if grad_h is not None:
        dh = dh + grad_h.to(acc)
    dbranch, dgate = gated_residual_bwd_reference(dh, branch.to(acc), gate, branch_grad, gate_grad)
    dbranch = dbranch.to(branch.dtype) if branch_grad else branch.new_empty(0)
    return dh.to(h.dtype) if x_grad else h.new_empty(0), dbranch, dgate, dw, db


def _opened(gate: Tensor, dtype: torch.dtype) -> Tensor:
    return gate.to(accumulator_dtype(gate.dtype)).tanh().to(dtype)


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _tanh(x):
    """tanh(x) by exp of a negative number: it cannot overflow, and small x keep their digits through the series."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    x2 = x * x
    small = tl.abs(x) * (1.0 - x2 * (0.3333333333333333 - x2 * (0.13333333333333333 - x2 * 0.05396825396825397)))
    return tl.where(x < 0, -1.0, 1.0) * tl.where(tl.abs(x) < 0.2, small, large)


@triton.jit
def _load_gate(gate_ptr, cols, N, SCALAR: tl.constexpr):
    """Return tanh of the gate: one number, or (1, BLOCK_N)."""
    if SCALAR:  # one `return`: the older triton types both branches
        opened = _tanh(tl.load(gate_ptr).to(tl.float32))
    else:
        opened = _tanh(tl.load(gate_ptr + cols, mask=cols < N, other=0.0).to(tl.float32))[None, :]
    return opened


@triton.jit
def _fwd_kernel(
    x_ptr, b_ptr, gate_ptr, y_ptr, M, N, SCALAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    offsets = rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    opened = _load_gate(gate_ptr, cols, N, SCALAR)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, (x + opened * b).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, b_ptr, gate_ptr, db_ptr, dgate_ptr, M, N, SCALAR: tl.constexpr, BRANCH_GRAD: tl.constexpr,
    GATE_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program walks its share of the rows and keeps its part of dgate in registers."""
    group = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    opened = _load_gate(gate_ptr, cols, N, SCALAR)
    dgate = tl.zeros((1, BLOCK_N), tl.float32)
    for start in range(group * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # `start` is a Python int in the interpreter
        offsets = rows[:, None] * N + cols[None, :]
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if BRANCH_GRAD:
            tl.store(db_ptr + offsets, (dy * opened).to(db_ptr.dtype.element_ty), mask=mask)
        if GATE_GRAD:
            dgate += tl.sum(dy * tl.load(b_ptr + offsets, mask=mask, other=0.0).to(tl.float32), 0)[None, :]
    if GATE_GRAD:
        tl.store(dgate_ptr + group * N + cols[None, :], dgate * (1.0 - opened * opened), mask=(cols < N)[None, :])


@triton.jit
def _norm_fwd_kernel(
    x_ptr, b_ptr, gate_ptr, w_ptr, shift_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, M, N, eps, SCALAR: tl.constexpr,
    CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    offsets = rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    stored = (x + _load_gate(gate_ptr, cols, N, SCALAR) * b).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + offsets, stored, mask=mask)
    h = stored.to(tl.float32)  # normalise what was stored, as the unfused pair does
    if CENTRED:
        mean = tl.sum(h, 1) / N
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        h = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(h * h, 1) / N + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    y = h * rstd[:, None] * tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(shift_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, b_ptr, gate_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, db_ptr, dgate_ptr, dw_ptr, dshift_ptr,
    M, N, SCALAR: tl.constexpr, CENTRED: tl.constexpr, HAS_DH: tl.constexpr, X_GRAD: tl.constexpr,
    BRANCH_GRAD: tl.constexpr, GATE_GRAD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program walks its share of the rows and keeps its parts of dgate, dw and dshift in registers."""
    group = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    opened = _load_gate(gate_ptr, cols, N, SCALAR)
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    dgate = tl.zeros((1, BLOCK_N), tl.float32)
    dw = tl.zeros((BLOCK_N,), tl.float32)
    dshift = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(group * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # `start` is a Python int in the interpreter
        offsets = rows[:, None] * N + cols[None, :]
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        if CENTRED:
            h = tl.where(mask, h - tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None], 0.0)
        normed = h * rstd
        if WEIGHT_GRAD:
            dw += tl.sum(dy * normed, 0)
        if BIAS_GRAD:
            dshift += tl.sum(dy, 0)
        if BLOCK_N > 4096:  # more than registers hold beside the sums: from the cache again
            w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        g = dy * w
        dh = g - normed * (tl.sum(g * normed, 1)[:, None] / N)
        if CENTRED:
            dh -= tl.sum(g, 1)[:, None] / N
        dh *= rstd
        if HAS_DH:
            dh += tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if X_GRAD:
            tl.store(dx_ptr + offsets, dh.to(dx_ptr.dtype.element_ty), mask=mask)
        if BRANCH_GRAD:
            tl.store(db_ptr + offsets, (dh * opened).to(db_ptr.dtype.element_ty), mask=mask)
        if GATE_GRAD:
            part = tl.where(mask, dh, 0.0) * tl.load(b_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dgate += tl.sum(part, 0)[None, :]
    if GATE_GRAD:
        tl.store(dgate_ptr + group * N + cols[None, :], dgate * (1.0 - opened * opened), mask=(cols < N)[None, :])
    if WEIGHT_GRAD:
        tl.store(dw_ptr + group * N + cols, dw, mask=cols < N)
    if BIAS_GRAD:
        tl.store(dshift_ptr + group * N + cols, dshift, mask=cols < N)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(n: int) -> dict[str, int]:
    block_n = next_power_of_2(n)
    return {
        "BLOCK_M": max(1, 2048 // block_n),
        "BLOCK_N": block_n,
        "num_warps": 4 if block_n <= 2048 else 8 if block_n <= 4096 else 16,
    }


def _has_kernel(x: Tensor) -> bool:
    return x.dtype != torch.float64 and x.shape[-1] <= MAX_WIDTH


def _groups(m: int, config: dict[str, int]) -> int:
    return max(1, min(cdiv(m, config["BLOCK_M"] * 4), 264))  # two programs an SM of the largest part (132)


def _total(partial: Tensor, gate: Tensor) -> Tensor:
    """Sum what the programs left of dgate (programs, D)."""
    return (partial.sum(0) if gate.numel() > 1 else partial.sum().reshape(1)).to(gate.dtype)


def gated_residual_triton(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    if not _has_kernel(x):
        return gated_residual_reference(x, branch, gate)
    n = x.shape[-1]
    m = x.numel() // n if n else 0
    x, branch, gate = x.contiguous(), branch.contiguous(), gate.contiguous()
    y = torch.empty_like(x)
    config = _config(n)
    if m:
        with device_of(x):
            _fwd_kernel[(cdiv(m, config["BLOCK_M"]),)](x, branch, gate, y, m, n, SCALAR=gate.numel() == 1, **config)
    return y


def gated_residual_bwd_triton(
    grad: Tensor, branch: Tensor, gate: Tensor, branch_grad: bool, gate_grad: bool
) -> tuple[Tensor, Tensor]:
    if not _has_kernel(branch):
        return gated_residual_bwd_reference(grad, branch, gate, branch_grad, gate_grad)
    n = branch.shape[-1]
    m = branch.numel() // n if n else 0
    grad, branch, gate = grad.contiguous(), branch.contiguous(), gate.contiguous()
    config = _config(n)
    groups = _groups(m, config)
    dbranch = torch.empty_like(branch) if branch_grad else branch.new_empty(0)
    partial = branch.new_empty((groups if gate_grad else 0, n), dtype=torch.float32)
    if m:
        with device_of(branch):
            _bwd_kernel[(groups,)](
                grad, branch, gate, dbranch, partial, m, n, SCALAR=gate.numel() == 1, BRANCH_GRAD=branch_grad,
                GATE_GRAD=gate_grad, **config,
            )  # fmt: skip
    else:
        partial.zero_()
    return dbranch, _total(partial, gate) if gate_grad else gate.new_empty(0)


def gated_residual_norm_triton(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, centred: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _has_kernel(x):
        return gated_residual_norm_reference(x, branch, gate, weight, bias, centred, eps)
    n = weight.numel()
    m = x.numel() // n if n else 0
    x, branch, gate, weight = (t.contiguous() for t in (x, branch, gate, weight))
    bias = None if bias is None else bias.contiguous()
    y, h = torch.empty_like(x), torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else rstd.new_empty(0)
    config = _config(n)
    if m:
        with device_of(x):
            _norm_fwd_kernel[(cdiv(m, config["BLOCK_M"]),)](
                x, branch, gate, weight, bias, y, h, mean, rstd, m, n, eps, SCALAR=gate.numel() == 1, CENTRED=centred,
                HAS_BIAS=bias is not None, **config,
            )  # fmt: skip
    return h, y, mean, rstd


def gated_residual_norm_bwd_triton(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, mean: Tensor,
    rstd: Tensor, centred: bool, x_grad: bool, branch_grad: bool, gate_grad: bool, weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    narrow = centred or gate.numel() > 1 or h.dtype == torch.float32
    if not _has_kernel(h) or (narrow and h.shape[-1] > MAX_WIDTH_NARROW):
        return gated_residual_norm_bwd_reference(
            grad_y,
            grad_h,
            h,
            branch,
            gate,
            weight,
            mean,
            rstd,
            centred,
            x_grad,
            branch_grad,
            gate_grad,
            weight_grad,
            bias_grad,
        )
    n = weight.numel()
    m = h.numel() // n if n else 0
    grad_y, h, branch, gate, weight, mean, rstd = (
        t.contiguous() for t in (grad_y, h, branch, gate, weight, mean, rstd)
    )
    grad_h = None if grad_h is None else grad_h.contiguous()
    config = _config(n)
    groups = _groups(m, config)
    dx = torch.empty_like(h) if x_grad else h.new_empty(0)
    dbranch = torch.empty_like(branch) if branch_grad else branch.new_empty(0)
    dgate, dw, db = (
        h.new_empty((groups if wanted else 0, n), dtype=torch.float32) for wanted in (gate_grad, weight_grad, bias_grad)
    )
    if m:
        with device_of(h):
            _norm_bwd_kernel[(groups,)](
                grad_y, grad_h, h, branch, gate, weight, mean, rstd, dx, dbranch, dgate, dw, db, m, n,
                SCALAR=gate.numel() == 1, CENTRED=centred, HAS_DH=grad_h is not None, X_GRAD=x_grad,
                BRANCH_GRAD=branch_grad, GATE_GRAD=gate_grad, WEIGHT_GRAD=weight_grad, BIAS_GRAD=bias_grad, **config,
            )  # fmt: skip
    else:
        for t in (dgate, dw, db):
            t.zero_()
    dgate = _total(dgate, gate) if gate_grad else gate.new_empty(0)
    dw, db = (
        t.sum(0).to(weight.dtype) if wanted else weight.new_empty(0)
        for t, wanted in ((dw, weight_grad), (db, bias_grad))
    )
    return dx, dbranch, dgate, dw, db


# 4. operator ----------------------------------------------------------------------------------------------------------
_gated_residual = torch.library.custom_op(
    "fastmllm::gated_residual",
    gated_residual_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor gate) -> Tensor",
)
_gated_residual.register_kernel("cuda")(gated_residual_triton)

_gated_residual_bwd = torch.library.custom_op(
    "fastmllm::gated_residual_bwd",
    gated_residual_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor branch, Tensor gate, bool branch_grad, bool gate_grad) -> (Tensor, Tensor)",
)
_gated_residual_bwd.register_kernel("cuda")(gated_residual_bwd_triton)

_gated_residual_norm = torch.library.custom_op(
    "fastmllm::gated_residual_norm",
    gated_residual_norm_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor gate, Tensor weight, Tensor? bias, bool centred, float eps)"
    " -> (Tensor h, Tensor y, Tensor mean, Tensor rstd)",
)
_gated_residual_norm.register_kernel("cuda")(gated_residual_norm_triton)

_gated_residual_norm_bwd = torch.library.custom_op(
    "fastmllm::gated_residual_norm_bwd",
    gated_residual_norm_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor branch, Tensor gate, Tensor weight, Tensor mean,"
    " Tensor rstd, bool centred, bool x_grad, bool branch_grad, bool gate_grad, bool weight_grad,"
    " bool bias_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_gated_residual_norm_bwd.register_kernel("cuda")(gated_residual_norm_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_gated_residual.register_fake
def _(x, branch, gate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_gated_residual_bwd.register_fake
def _(grad, branch, gate, branch_grad, gate_grad):
    return _like(branch, branch_grad), _like(gate, gate_grad)


@_gated_residual_norm.register_fake
def _(x, branch, gate, weight, bias, centred, eps):
    rstd = x.new_empty(x.shape[:-1], dtype=accumulator_dtype(x.dtype))
    return _like(x, True), _like(x, True), _like(rstd, centred), rstd


@_gated_residual_norm_bwd.register_fake
def _(
    grad_y, grad_h, h, branch, gate, weight, mean, rstd, centred, x_grad, branch_grad, gate_grad, weight_grad, bias_grad
):
    grads = ((h, x_grad), (branch, branch_grad), (gate, gate_grad), (weight, weight_grad), (weight, bias_grad))
    return tuple(_like(t, wanted) for t, wanted in grads)


def _like(t: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format) if wanted else t.new_empty(0)


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    _, branch, gate = inputs
    ctx.save_for_backward(branch, gate)
    ctx.set_materialize_grads(False)


def _backward_of_sum(grad, branch, gate, need_x, need_branch, need_gate):
    dbranch = dgate = None
    if need_branch or need_gate:
        dbranch, dgate = _gated_residual_bwd(grad.contiguous(), branch, gate, need_branch, need_gate)
    return grad if need_x else None, dbranch if need_branch else None, dgate if need_gate else None


def _backward(ctx, grad):
    if grad is None:
        return None, None, None
    return _backward_of_sum(grad, *ctx.saved_tensors, *ctx.needs_input_grad)


_gated_residual.register_autograd(_backward, setup_context=_setup_context)


def _norm_setup_context(ctx, inputs, output):
    _, branch, gate, weight, bias, ctx.centred, _ = inputs
    h, _, mean, rstd = output
    ctx.save_for_backward(h, branch, gate, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _norm_backward(ctx, grad_h, grad_y, _grad_mean, _grad_rstd):
    need_x, need_branch, need_gate, need_weight, need_bias = ctx.needs_input_grad[:5]
    h, branch, gate, weight, mean, rstd = ctx.saved_tensors
    if grad_y is None:  # the norm was not used
        if grad_h is None:
            return (None,) * 7
        return *_backward_of_sum(grad_h, branch, gate, need_x, need_branch, need_gate), None, None, None, None
    dx, dbranch, dgate, dw, db = _gated_residual_norm_bwd(
        grad_y.contiguous(), None if grad_h is None else grad_h.contiguous(), h, branch, gate, weight, mean, rstd,
        ctx.centred, need_x, need_branch, need_gate, need_weight, need_bias,
    )  # fmt: skip
    grads = ((dx, need_x), (dbranch, need_branch), (dgate, need_gate), (dw, need_weight), (db, need_bias))
    return *(t if need else None for t, need in grads), None, None


_gated_residual_norm.register_autograd(_norm_backward, setup_context=_norm_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
@overload
def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor: ...


@overload
def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, norm_weight: Tensor, norm_bias: Tensor | None = None, eps: float = 1e-5,
    kind: str = "rms",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    kind: str = "rms",
) -> Tensor | tuple[Tensor, Tensor]:
    """Add a branch through a tanh gate, h = x + tanh(gate) * branch, and normalise the sum.

    Args:
        x: (..., D) float tensor.
        branch: (..., D), the shape and dtype of `x`.
        gate: (1,) or (D,), or () for one number; learned from 0 in both checkpoint families.
        norm_weight: (D,) scale of the norm behind the sum, or None for no norm.
        norm_bias: (D,) shift of that norm, or None.
        eps: added to the norm's mean square or variance.
        kind: of the norm, "rms" (Llama-3.2-Vision, Idefics) or "layer" (OpenFlamingo).

    Returns:
        h (..., D) in the dtype of `x`; the sum is taken in fp32. With a norm, the pair (h, norm(h)).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the kind of norm is unknown.

    Flamingo (arXiv 2204.14198); Llama-3.2-Vision and Idefics use it for the attention and the feed-forward branch.
    """
    if branch.shape != x.shape or branch.dtype != x.dtype or branch.device != x.device:
        raise ValueError(f"fastmllm::gated_residual: x {tuple(x.shape)} {x.dtype} on {x.device} and branch "
                         f"{tuple(branch.shape)} {branch.dtype} on {branch.device} differ")  # fmt: skip
    if x.dim() < 1 or gate.numel() not in (1, x.shape[-1]) or gate.dim() > 1 or gate.device != x.device:
        raise ValueError(f"fastmllm::gated_residual: gate {tuple(gate.shape)} on {gate.device} must be (1,) or (D,) "
                         f"with x (..., D), but x is {tuple(x.shape)} on {x.device}")  # fmt: skip
    if not x.is_floating_point() or not gate.is_floating_point():
        raise ValueError(f"fastmllm::gated_residual: x {x.dtype} and gate {gate.dtype} must be floating point")
    if kind not in ("rms", "layer"):
        raise ValueError(f'fastmllm::gated_residual: kind {kind!r} must be "rms" or "layer"')
    if norm_weight is None:
        if norm_bias is not None:
            raise ValueError(f"fastmllm::gated_residual: norm_bias {tuple(norm_bias.shape)} without norm_weight")
        return _gated_residual(x, branch, gate.reshape(-1))
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if t is not None and (
            t.shape != x.shape[-1:] or t.dtype != norm_weight.dtype or t.device != x.device or not t.is_floating_point()
        ):
            raise ValueError(f"fastmllm::gated_residual: {name} {tuple(t.shape)} {t.dtype} on {t.device} must be (D,) "
                             f"in one floating dtype, but x is {tuple(x.shape)} on {x.device}")  # fmt: skip
    h, y, _, _ = _gated_residual_norm(x, branch, gate.reshape(-1), norm_weight, norm_bias, kind == "layer", eps)
    return h, y
