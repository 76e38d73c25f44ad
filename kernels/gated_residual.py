"""x + tanh(gate) * branch: how Flamingo (arXiv 2204.14198) and Llama-3.2-Vision add a cross-attention branch.

Shapes: M rows (all leading dimensions), D width; the gate is one number (1,) or one a channel (D,). A gate of 0 leaves
x as it is, so a new branch starts as the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import accumulator_dtype, cdiv, device_of, next_power_of_2, tl, triton

MAX_WIDTH = 16384  # one row is held in registers


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
    product = grad * branch
    total = (
        product.sum(dtype=acc).reshape(1) if gate.numel() == 1 else product.reshape(-1, gate.numel()).sum(0, dtype=acc)
    )
    return dbranch, (total * (1 - _opened(gate, acc).square())).to(gate.dtype)


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


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(n: int) -> dict[str, int]:
    block_n = next_power_of_2(n)
    return {
        "BLOCK_M": max(1, 2048 // block_n),
        "BLOCK_N": block_n,
        "num_warps": 4 if block_n <= 2048 else 8 if block_n <= 8192 else 16,
    }


def _rows(x: Tensor) -> tuple[int, int]:
    n = x.shape[-1]
    if n > MAX_WIDTH:
        raise ValueError(f"fastmllm::gated_residual: width {n} exceeds the Triton kernel's {MAX_WIDTH}")
    return (x.numel() // n if n else 0), n


def gated_residual_triton(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    m, n = _rows(x)
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
    m, n = _rows(branch)
    grad, branch, gate = grad.contiguous(), branch.contiguous(), gate.contiguous()
    config = _config(n)
    groups = max(1, min(cdiv(m, config["BLOCK_M"] * 4), 264))  # two programs an SM of the largest part (132)
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
    if not gate_grad:
        return dbranch, gate.new_empty(0)
    total = partial.sum(0) if gate.numel() > 1 else partial.sum().reshape(1)
    return dbranch, total.to(gate.dtype)


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


# 5. fake --------------------------------------------------------------------------------------------------------------
@_gated_residual.register_fake
def _(x, branch, gate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_gated_residual_bwd.register_fake
def _(grad, branch, gate, branch_grad, gate_grad):
    contiguous = torch.contiguous_format
    dbranch = torch.empty_like(branch, memory_format=contiguous) if branch_grad else branch.new_empty(0)
    return dbranch, torch.empty_like(gate, memory_format=contiguous) if gate_grad else gate.new_empty(0)


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    _, branch, gate = inputs
    ctx.save_for_backward(branch, gate)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad):
    if grad is None:
        return None, None, None
    dx, dbranch, dgate = ctx.needs_input_grad
    grads = None, None
    if dbranch or dgate:
        grads = _gated_residual_bwd(grad.contiguous(), *ctx.saved_tensors, dbranch, dgate)
    return grad if dx else None, grads[0] if dbranch else None, grads[1] if dgate else None


_gated_residual.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Add a branch through a tanh gate: x + tanh(gate) * branch.

    Args:
        x: (..., D) float tensor.
        branch: (..., D), the shape and dtype of `x`.
        gate: (1,) or (D,), or () for one number; learned from 0 in both checkpoint families.

    Returns:
        (..., D) in the dtype of `x`; the sum is taken in fp32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

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
    return _gated_residual(x, branch, gate.reshape(-1))
