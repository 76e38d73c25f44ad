"""The two-layer GELU MLP of vision towers: act(x W1^T + b1) W2^T + b2 (GELU: Hendrycks and Gimpel, arXiv 1606.08415).

Shapes: M rows (all leading dimensions), D width, F hidden width, E output width. The products are torch's; ours is what
stands between them. Forward: bias and activation in one pass over the hidden layer. Backward: one pass recomputes the
activation, multiplies the gradient by its derivative and sums the bias gradient. For the backward x (M, D) and
`hidden` = x W1^T (M, F) are kept, not the activation: M * F * itemsize bytes less than torch's two linears and gelu.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import accumulator_dtype, cdiv, device_of, next_power_of_2, tl, triton
from ._watch import report

ACTIVATIONS = ("none", "tanh", "quick")  # erf, its tanh approximation, x * sigmoid(1.702 x)


# 1. reference ---------------------------------------------------------------------------------------------------------
def gelu_mlp_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, approximate: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(bias_gelu_reference, x, weight1, bias1, weight2, bias2, approximate, keep_hidden)


def gelu_mlp_bwd_reference(
    grad: Tensor, x: Tensor | None, hidden: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor,
    approximate: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kernels = bias_gelu_reference, bias_gelu_bwd_reference
    return _gradients(*kernels, grad, x, hidden, weight1, bias1, weight2, approximate, needs)


def bias_gelu_reference(hidden: Tensor, bias: Tensor | None, approximate: str, reuse: bool) -> Tensor:
    """Return act(hidden + bias); with `reuse` the storage of `hidden` may be taken."""
    return _activate(_biased(hidden, bias, reuse), approximate).to(hidden.dtype)


def bias_gelu_bwd_reference(
    grad: Tensor, hidden: Tensor, bias: Tensor | None, approximate: str, activation: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient before the activation, the activation if wanted, the bias gradient if wanted."""
    z = _biased(hidden, bias, False)
    if approximate == "quick":
        s = torch.sigmoid(1.702 * z)
        dz = grad.to(z.dtype) * (s * (1 + 1.702 * z * (1 - s)))
    else:
        dz = torch.ops.aten.gelu_backward(grad.to(z.dtype), z, approximate=approximate)
    y = _activate(z, approximate).to(hidden.dtype) if activation else hidden.new_empty(0)
    return dz.to(hidden.dtype), y, dz.sum(0).to(hidden.dtype) if bias_grad else hidden.new_empty(0)


def _biased(hidden: Tensor, bias: Tensor | None, reuse: bool) -> Tensor:
    acc = accumulator_dtype(hidden.dtype)
    if bias is None:
        return hidden.to(acc)
    return hidden.add_(bias) if reuse and hidden.dtype == acc else hidden + bias.to(acc)  # bf16 + fp32 is fp32


def _activate(z: Tensor, approximate: str) -> Tensor:
    return z * torch.sigmoid(1.702 * z) if approximate == "quick" else F.gelu(z, approximate=approximate)


def _forward(bias_gelu, x, weight1, bias1, weight2, bias2, approximate, keep_hidden):
    hidden = F.linear(x.reshape(-1, x.shape[-1]), weight1)  # (M, F)
    y = F.linear(bias_gelu(hidden, bias1, approximate, not keep_hidden), weight2, bias2)
    return y.view(*x.shape[:-1], len(weight2)), hidden if keep_hidden else x.new_empty(0)


def _gradients(bias_gelu, bias_gelu_bwd, grad, x, hidden, weight1, bias1, weight2, approximate, needs):
    """Compute the gradients of x, weight1, bias1, weight2, bias2 that `needs` names; the others are empty."""
    for_x, for_weight1, for_bias1, for_weight2, for_bias2 = needs
    leading, grad = grad.shape[:-1], grad.reshape(-1, grad.shape[-1])  # (M, E)
    dx, dw1, db1, dw2, db2 = (grad.new_empty(0) for _ in needs)
    if for_x or for_weight1 or for_bias1:
        dz, activation, db1 = bias_gelu_bwd(grad @ weight2, hidden, bias1, approximate, for_weight2, for_bias1)
        dx = (dz @ weight1).view(*leading, weight1.shape[1]) if for_x else dx
        dw1 = dz.t() @ x.reshape(-1, x.shape[-1]) if for_weight1 else dw1
    elif for_weight2:
        activation = bias_gelu(hidden, bias1, approximate, False)
    dw2 = grad.t() @ activation if for_weight2 else dw2
    return dx, dw1, db1, dw2, grad.sum(0) if for_bias2 else db2


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _gate(z, ACT: tl.constexpr):
    """Return g(z), where act(z) = z g(z), and g'(z)."""
    if ACT == "none":
        # Abramowitz and Stegun, 7.1.26: cheaper than erf, no cancellation, and it shares the exponential with the slope
        bell = tl.exp(-0.5 * z * z)
        t = 1.0 / (1.0 + 0.23164189 * tl.abs(z))
        series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
        tail = 0.5 * t * series * bell
        gate = tl.where(z < 0, tail, 1.0 - tail)
        slope = 0.3989422804014327 * bell
    else:  # tanh(u) = 2 sigmoid(2 u) - 1, so both are sigmoids
        if ACT == "tanh":
            inner = z * (1.5957691216057308 + 0.07135481627260025 * z * z)
            inner_slope = 1.5957691216057308 + 0.21406444881780075 * z * z
        else:
            inner = 1.702 * z
            inner_slope = 1.702
        gate = 1.0 / (1.0 + tl.exp(-inner))
        slope = gate * (1.0 - gate) * inner_slope
    return gate, slope


@triton.jit
def _fwd_kernel(
    h_ptr, b_ptr, y_ptr, M, N, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    z = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    gate, _ = _gate(z, ACT)
    tl.store(y_ptr + offsets, (z * gate).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, h_ptr, b_ptr, dz_ptr, y_ptr, db_ptr, M, N, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program walks its share of the rows and keeps its part of db in registers; dz may be stored over dy."""
    group = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BIAS:
        bias = tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    for start in range(group * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # `start` is a Python int in the interpreter
        offsets = rows[:, None] * N + cols[None, :]
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        z = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += bias
        gate, slope = _gate(z, ACT)
        dz = dy * (gate + z * slope)
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if ACTIVATION:
            tl.store(y_ptr + offsets, (z * gate).to(y_ptr.dtype.element_ty), mask=mask)
        if BIAS_GRAD:
            db += dz
    if BIAS_GRAD:
        tl.store(db_ptr + group.to(tl.int64) * N + cols, tl.sum(db, 0), mask=cols < N)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(n: int) -> dict[str, int]:
    block_n = min(512, next_power_of_2(n))
    return {"BLOCK_M": max(1, 2048 // block_n), "BLOCK_N": block_n, "num_warps": 4}


def bias_gelu_triton(hidden: Tensor, bias: Tensor | None, approximate: str, reuse: bool) -> Tensor:
    m, n = hidden.shape
    hidden = hidden.contiguous()
    y = hidden if reuse else torch.empty_like(hidden)
    config = _config(n)
    if hidden.numel():
        with device_of(hidden):
            _fwd_kernel[(cdiv(m, config["BLOCK_M"]), cdiv(n, config["BLOCK_N"]))](
                hidden, bias, y, m, n, HAS_BIAS=bias is not None, ACT=approximate, **config
            )
    return y


def bias_gelu_bwd_triton(
    grad: Tensor, hidden: Tensor, bias: Tensor | None, approximate: str, activation: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Do as the reference; `grad` is the caller's own and is overwritten."""
    m, n = hidden.shape
    grad, hidden = grad.contiguous(), hidden.contiguous()
    config = _config(n)
    columns = max(1, cdiv(n, config["BLOCK_N"]))
    groups = max(
        1, min(cdiv(m, config["BLOCK_M"] * 4), cdiv(1056, columns))
    )  # eight programs an SM of the largest part
    y = torch.empty_like(hidden) if activation else hidden.new_empty(0)
    partial = hidden.new_empty((groups if bias_grad else 0, n), dtype=torch.float32)
    if hidden.numel():
        with device_of(hidden):
            _bwd_kernel[(groups, columns)](
                grad, hidden, bias, grad, y, partial, m, n, HAS_BIAS=bias is not None, ACT=approximate,
                ACTIVATION=activation, BIAS_GRAD=bias_grad, **config,
            )  # fmt: skip
    elif bias_grad:
        partial.zero_()
    return grad, y, partial.sum(0).to(hidden.dtype) if bias_grad else hidden.new_empty(0)


def gelu_mlp_triton(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, approximate: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return gelu_mlp_reference(x, weight1, bias1, weight2, bias2, approximate, keep_hidden)
    bias1 = None if bias1 is None else bias1.contiguous()
    return _forward(bias_gelu_triton, x, weight1, bias1, weight2, bias2, approximate, keep_hidden)


def gelu_mlp_bwd_triton(
    grad: Tensor, x: Tensor | None, hidden: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor,
    approximate: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if grad.dtype == torch.float64:
        return gelu_mlp_bwd_reference(grad, x, hidden, weight1, bias1, weight2, approximate, needs)
    bias1 = None if bias1 is None else bias1.contiguous()
    kernels = bias_gelu_triton, bias_gelu_bwd_triton
    return _gradients(*kernels, grad, x, hidden, weight1, bias1, weight2, approximate, needs)


# 4. operator ----------------------------------------------------------------------------------------------------------
_gelu_mlp = torch.library.custom_op(
    "fastmllm::gelu_mlp",
    gelu_mlp_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str approximate,"
    " bool keep_hidden) -> (Tensor, Tensor)",
)
_gelu_mlp.register_kernel("cuda")(gelu_mlp_triton)

_gelu_mlp_bwd = torch.library.custom_op(
    "fastmllm::gelu_mlp_bwd",
    gelu_mlp_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor? x, Tensor hidden, Tensor weight1, Tensor? bias1, Tensor weight2, str approximate,"
    " bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_gelu_mlp_bwd.register_kernel("cuda")(gelu_mlp_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_gelu_mlp.register_fake
def _(x, weight1, bias1, weight2, bias2, approximate, keep_hidden):
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    hidden = x.new_empty(rows, weight1.shape[0]) if keep_hidden else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], weight2.shape[0]), hidden


@_gelu_mlp_bwd.register_fake
def _(grad, x, hidden, weight1, bias1, weight2, approximate, needs):
    shapes = (*grad.shape[:-1], weight1.shape[1]), weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1]
    return tuple(grad.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    x, weight1, bias1, weight2, bias2, ctx.approximate, _ = inputs
    for_x, for_weight1, for_bias1, for_weight2, for_bias2 = ctx.needs_input_grad[:5]
    ctx.needs = [for_x, for_weight1, for_bias1 and bias1 is not None, for_weight2, for_bias2 and bias2 is not None]
    ctx.save_for_backward(
        x if for_weight1 else None, output[1] if any(ctx.needs[:4]) else output[1].new_empty(0), weight1, bias1, weight2
    )
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_hidden):
    if grad is None:
        return (None,) * 7
    grads = _gelu_mlp_bwd(grad, *ctx.saved_tensors, ctx.approximate, ctx.needs)
    return *(g if need else None for g, need in zip(grads, ctx.needs, strict=True)), None, None


_gelu_mlp.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def gelu_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    approximate: str = "none",
) -> Tensor:
    """Apply linear, GELU, linear, and keep no activation for the backward.

    Kept under autograd: x (M x D, only for a learning weight1) and x W1^T (M x F), where torch keeps x, the biased
    hidden layer and the activation (another M x F). Without autograd nothing is kept and the activation overwrites the
    hidden layer. Frozen weights and biases cost neither products nor sums.

    Args:
        x: (..., D) float.
        weight1: (F, D), nn.Linear's layout.
        bias1: (F,), or None.
        weight2: (E, F).
        bias2: (E,), or None.
        approximate: "none" (erf), "tanh", or "quick" (x * sigmoid(1.702 x), CLIP and Qwen2-VL).

    Returns:
        (..., E) in the dtype of `x`; bias and activation are computed in fp32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or `approximate` is another word.

    Equal to the MLP of CLIP ("quick"), SigLIP and Qwen3-VL ("tanh"), DINOv2, InternViT and LLaVA's projector ("none");
    GELU: arXiv 1606.08415.
    """
    shapes = f"x {tuple(x.shape)}, weight1 {tuple(weight1.shape)} and weight2 {tuple(weight2.shape)}"
    if x.dim() < 1 or weight1.dim() != 2 or weight2.dim() != 2 or 0 in (*weight1.shape, *weight2.shape):
        raise ValueError(f"fastmllm::gelu_mlp: {shapes} must be (..., D), (F, D) and (E, F)")
    if x.shape[-1] != weight1.shape[1] or weight1.shape[0] != weight2.shape[1]:
        raise ValueError(f"fastmllm::gelu_mlp: {shapes} must be (..., D), (F, D) and (E, F)")
    for name, bias, weight in (("bias1", bias1, weight1), ("bias2", bias2, weight2)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"fastmllm::gelu_mlp: {name} {tuple(bias.shape)} must be {tuple(weight.shape[:1])}")
    if approximate not in ACTIVATIONS:
        raise ValueError(f"fastmllm::gelu_mlp: approximate {approximate!r} must be one of {ACTIVATIONS}")
    for name, tensor in (("weight1", weight1), ("bias1", bias1), ("weight2", weight2), ("bias2", bias2)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"fastmllm::gelu_mlp: x is {x.dtype} on {x.device}, but {name} is {tensor.dtype} on "
                             f"{tensor.device}")  # fmt: skip
    if not x.is_floating_point():
        raise ValueError(f"fastmllm::gelu_mlp: x {x.dtype} must be floating point")
    learns = any(t is not None and t.requires_grad for t in (x, weight1, bias1, weight2, bias2))
    out, _ = _gelu_mlp(x, weight1, bias1, weight2, bias2, approximate, learns and torch.is_grad_enabled())
    report("gelu_mlp", x, weight1, bias1, weight2)
    return out
