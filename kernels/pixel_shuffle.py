"""Space to depth: r x r neighbouring visual tokens become one wide token, normalised in the same pass.

Shapes: M packed tokens of all images, D width, r factor, O = M / r^2 output tokens. A row of the norm is an output
token (r^2 D, InternVL) or each token in it (D, Qwen). In the kernels a row is PARTS runs of RUN contiguous numbers, and
an output token PER rows: where a run starts is address arithmetic, nothing is moved twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._runs import Grid, find_run, image_runs, join_runs, upload
from ._triton import accumulator_dtype, cdiv, device_of, next_power_of_2, tl, triton
from .layer_norm import layer_norm

MAX_WIDTH = 8192  # of the norm, padded: its row and the sums of its gradients are held in registers
ORDERS = ("rows", "columns", "merged")


# 1. reference ---------------------------------------------------------------------------------------------------------
def _blocks(x: Tensor, packed: Tensor, grid: Sequence[int], factor: int, columns: bool) -> list[tuple[Tensor, Tensor]]:
    """Return, for each run of images, views of the tokens and of the packed tokens in the same order."""
    views, start, r, width = [], 0, factor, x.shape[1]
    for count, h, w in zip(grid[::3], grid[1::3], grid[2::3], strict=True):
        end = start + count * h * w
        here = x[start:end].view(count, h // r, r, w // r, r, width).transpose(2, 3)
        shape = (count, w // r, h // r, r, r, width) if columns else (count, h // r, w // r, r, r, width)
        there = packed[start // r**2 : end // r**2].view(shape)
        views.append((here, there.transpose(1, 2) if columns else there))
        start = end
    return views


def _shuffle(x: Tensor, grid: Sequence[int], factor: int, columns: bool, dtype: torch.dtype) -> Tensor:
    packed = x.new_empty((x.shape[0] // factor**2, factor**2 * x.shape[1]), dtype=dtype)
    for here, there in _blocks(x.contiguous(), packed, grid, factor, columns):
        there.copy_(here)
    return packed


def _unshuffle(packed: Tensor, grid: Sequence[int], factor: int, columns: bool, dtype: torch.dtype) -> Tensor:
    x = packed.new_empty((packed.shape[0] * factor**2, packed.shape[1] // factor**2), dtype=dtype)
    for here, there in _blocks(x, packed.contiguous(), grid, factor, columns):
        here.copy_(there)
    return x


def pixel_shuffle_reference(
    x: Tensor, grid: Sequence[int], factor: int, columns: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if weight is None:
        return _shuffle(x, grid, factor, columns, x.dtype), x.new_empty(0), x.new_empty(0)
    acc = accumulator_dtype(x.dtype)
    rows = _shuffle(x, grid, factor, columns, acc).view(-1, weight.numel())
    y, mean, rstd = torch.native_layer_norm(
        rows, weight.shape, weight.to(acc), None if bias is None else bias.to(acc), eps
    )
    return y.to(x.dtype).view(-1, factor**2 * x.shape[1]), mean.view(-1), rstd.view(-1)


def pixel_shuffle_bwd_reference(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    grid: Sequence[int], factor: int, columns: bool, input_grad: bool, weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none = grad.new_empty(0)
    if x is None or weight is None or mean is None or rstd is None:
        return _unshuffle(grad, grid, factor, columns, grad.dtype), none, grad.new_empty(0)
    acc = mean.dtype
    rows = _shuffle(x, grid, factor, columns, acc).view(-1, weight.numel())
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        grad.to(acc).reshape(rows.shape), rows, weight.shape, mean.unsqueeze(-1), rstd.unsqueeze(-1), weight.to(acc),
        torch.zeros_like(weight, dtype=acc), [input_grad, weight_grad, weight_grad],
    )  # fmt: skip
    return (
        _unshuffle(dx.view(grad.shape), grid, factor, columns, x.dtype) if input_grad else none,
        dw.to(weight.dtype) if weight_grad else weight.new_empty(0),
        db.to(weight.dtype) if weight_grad else weight.new_empty(0),
    )


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _source(
    rows, table_ptr, runs,
    STEPS: tl.constexpr, COLUMNS: tl.constexpr, FACTOR: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Return the token that a row starts with and the tokens from there to its next part: a line of the image."""
    PER: tl.constexpr = FACTOR * FACTOR // (PARTS * TOKENS)
    ACROSS: tl.constexpr = FACTOR // TOKENS
    rows = rows.to(tl.int32)  # tokens are fewer than 2^31, and a division of int64 is a call
    out = rows // PER
    run = find_run(table_ptr, out, runs, STEPS)
    start = tl.load(table_ptr + run)
    h = tl.load(table_ptr + runs + 1 + run)  # of the output grid
    w = tl.load(table_ptr + 2 * runs + 1 + run)
    image = (out - start) // (h * w)
    place = (out - start) % (h * w)
    if COLUMNS:
        i = place % h
        j = place // h
    else:
        i = place // w
        j = place % w
    line = w * FACTOR
    inside = rows % PER
    first = (start + image * h * w) * FACTOR * FACTOR + (i * FACTOR + inside // ACROSS) * line + j * FACTOR
    return (first + inside % ACROSS).to(tl.int64), line.to(tl.int64)


@triton.jit
def _copy_kernel(
    x_ptr, y_ptr, table_ptr, runs, M, D,
    STEPS: tl.constexpr, COLUMNS: tl.constexpr, FACTOR: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Move FACTOR tokens at a time from the image to the packed tokens, or back."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, _ = _source(rows, table_ptr, runs, STEPS, COLUMNS, FACTOR, 1, FACTOR)
    mask = (rows < M)[:, None] & (cols < FACTOR * D)[None, :]
    here = first[:, None] * D + cols[None, :]
    there = rows[:, None] * (FACTOR * D) + cols[None, :]
    if BACKWARD:
        tl.store(x_ptr + here, tl.load(y_ptr + there, mask=mask), mask=mask)
    else:
        tl.store(y_ptr + there, tl.load(x_ptr + here, mask=mask), mask=mask)


@triton.jit
def _fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, table_ptr, runs, M, D, eps,
    HAS_BIAS: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr, FACTOR: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    parts = tl.arange(0, BLOCK_P)
    cols = tl.arange(0, BLOCK_N)
    run = TOKENS * D
    width = PARTS * run
    inside = (parts < PARTS)[:, None] & (cols < run)[None, :]
    place = parts[:, None] * run + cols[None, :]  # (BLOCK_P, BLOCK_N) in a row
    mask = (rows < M)[:, None, None] & inside[None, :, :]
    first, line = _source(rows, table_ptr, runs, STEPS, COLUMNS, FACTOR, PARTS, TOKENS)
    tokens = first[:, None] + parts[None, :] * line[:, None]
    h = tl.load(x_ptr + tokens[:, :, None] * D + cols[None, None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(h, 2), 1) / width  # (BLOCK_M,)
    centred = tl.where(mask, h - mean[:, None, None], 0.0)
    rstd = tl.rsqrt(tl.sum(tl.sum(centred * centred, 2), 1) / width + eps)
    y = centred * rstd[:, None, None] * tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)[None, :, :]
    if HAS_BIAS:
        y += tl.load(b_ptr + place, mask=inside, other=0.0).to(tl.float32)[None, :, :]
    tl.store(y_ptr + rows[:, None, None] * width + place[None, :, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def _bwd_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr, table_ptr, runs, M, D,
    INPUT_GRAD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
    FACTOR: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program walks its share of the rows and keeps its part of dw and db in registers."""
    group = tl.program_id(0)
    parts = tl.arange(0, BLOCK_P)
    cols = tl.arange(0, BLOCK_N)
    run = TOKENS * D
    width = PARTS * run
    inside = (parts < PARTS)[:, None] & (cols < run)[None, :]
    place = parts[:, None] * run + cols[None, :]
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)[None, :, :]
    dw = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(group * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < M)[:, None, None] & inside[None, :, :]
        first, line = _source(rows, table_ptr, runs, STEPS, COLUMNS, FACTOR, PARTS, TOKENS)
        tokens = first[:, None] + parts[None, :] * line[:, None]
        here = tokens[:, :, None] * D + cols[None, None, :]
        there = rows[:, None, None] * width + place[None, :, :]
        dy = tl.load(dy_ptr + there, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(x_ptr + here, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        normed = tl.where(mask, (h - mean[:, None, None]) * rstd[:, None, None], 0.0)
        if WEIGHT_GRAD:
            dw += tl.sum(dy * normed, 0)
            db += tl.sum(dy, 0)
        if INPUT_GRAD:
            g = dy * w
            shift = tl.sum(tl.sum(g, 2), 1) / width
            slope = tl.sum(tl.sum(g * normed, 2), 1) / width
            dx = (g - shift[:, None, None] - normed * slope[:, None, None]) * rstd[:, None, None]
            tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if WEIGHT_GRAD:
        tl.store(dw_ptr + group * width + place, dw, mask=inside)
        tl.store(db_ptr + group * width + place, db, mask=inside)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(width: int, factor: int, norm_width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the shape of a row and the tile of the norm's kernels."""
    whole = norm_width != width  # an output token is a row, in `factor` parts
    block_p = next_power_of_2(factor) if whole else 1
    block_n = next_power_of_2(width * (factor if whole else 1))
    block = block_p * block_n
    return {
        "FACTOR": factor,
        "PARTS": factor if whole else 1,
        "TOKENS": factor if whole else 1,
        "BLOCK_M": max(1, 2048 // block),
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "num_warps": 4 if block <= 2048 else 8 if block * dtype.itemsize <= 8192 else 16,
    }


def _has_kernel(dtype: torch.dtype, config: dict[str, int]) -> bool:
    return dtype != torch.float64 and config["BLOCK_P"] * config["BLOCK_N"] <= MAX_WIDTH


def _table(grid: Sequence[int], factor: int, device: torch.device) -> tuple[Tensor, int, int]:
    """Return the first output token of each run and the output grids, how many runs, and the steps to find one."""
    starts = [0]
    for count, h, w in zip(grid[::3], grid[1::3], grid[2::3], strict=True):
        starts.append(starts[-1] + count * (h // factor) * (w // factor))
    values = (*starts, *(h // factor for h in grid[1::3]), *(w // factor for w in grid[2::3]))
    runs = len(starts) - 1
    return upload(values, device), runs, max(runs - 1, 0).bit_length()


def _copy(x: Tensor, packed: Tensor, grid: Sequence[int], factor: int, columns: bool, backward: bool) -> None:
    block = min(1024, next_power_of_2(factor * x.shape[1]))
    if x.numel():
        table, runs, steps = _table(grid, factor, x.device)
        rows, block_m = packed.shape[0] * factor, 4096 // block
        with device_of(x):
            _copy_kernel[(cdiv(rows, block_m), cdiv(factor * x.shape[1], block))](
                x, packed, table, runs, rows, x.shape[1], STEPS=steps, COLUMNS=columns, FACTOR=factor,
                BACKWARD=backward, BLOCK_M=block_m, BLOCK_N=block, num_warps=4,
            )  # fmt: skip


def pixel_shuffle_triton(
    x: Tensor, grid: Sequence[int], factor: int, columns: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    m, width = x.shape
    y = x.new_empty((m // factor**2, factor**2 * width))
    if weight is None:
        _copy(x, y, grid, factor, columns, backward=False)
        return y, x.new_empty(0), x.new_empty(0)
    config = _config(width, factor, weight.numel(), x.dtype)
    if not _has_kernel(x.dtype, config):
        return pixel_shuffle_reference(x, grid, factor, columns, weight, bias, eps)
    rows = m * width // weight.numel()
    mean = x.new_empty(rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if m:
        table, runs, steps = _table(grid, factor, x.device)
        with device_of(x):
            _fwd_kernel[(cdiv(rows, config["BLOCK_M"]),)](
                x, weight.contiguous(), None if bias is None else bias.contiguous(), y, mean, rstd, table, runs, rows,
                width, eps, HAS_BIAS=bias is not None, STEPS=steps, COLUMNS=columns, **config,
            )  # fmt: skip
    return y, mean, rstd


def pixel_shuffle_bwd_triton(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    grid: Sequence[int], factor: int, columns: bool, input_grad: bool, weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad = grad.contiguous()
    if x is None or weight is None or mean is None or rstd is None:
        dx = grad.new_empty((grad.shape[0] * factor**2, grad.shape[1] // factor**2))
        _copy(dx, grad, grid, factor, columns, backward=True)
        return dx, grad.new_empty(0), grad.new_empty(0)
    m, width = x.shape
    config = _config(width, factor, weight.numel(), x.dtype)
    if not _has_kernel(x.dtype, config):
        return pixel_shuffle_bwd_reference(
            grad, x, weight, mean, rstd, grid, factor, columns, input_grad, weight_grad
        )  # fmt: skip
    x, norm_width = x.contiguous(), weight.numel()
    rows = m * width // norm_width
    groups = max(1, min(cdiv(rows, config["BLOCK_M"] * 4), 264))  # two programs an SM of the largest part (132)
    dx = torch.empty_like(x) if input_grad else grad.new_empty(0)
    partial = x.new_empty((2, groups if weight_grad else 0, norm_width), dtype=torch.float32)
    if m:
        table, runs, steps = _table(grid, factor, x.device)
        with device_of(x):
            _bwd_kernel[(groups,)](
                grad, x, weight.contiguous(), mean.contiguous(), rstd.contiguous(), dx, partial[0], partial[1], table,
                runs, rows, width, INPUT_GRAD=input_grad, WEIGHT_GRAD=weight_grad, STEPS=steps, COLUMNS=columns,
                **config,
            )  # fmt: skip
    elif weight_grad:
        partial.zero_()
    if not weight_grad:
        return dx, weight.new_empty(0), weight.new_empty(0)
    dw, db = partial.sum(1).to(weight.dtype)
    return dx, dw, db.clone()  # two outputs may not share storage


# 4. operator ----------------------------------------------------------------------------------------------------------
_pixel_shuffle = torch.library.custom_op(
    "fastmllm::pixel_shuffle",
    pixel_shuffle_reference,
    mutates_args=(),
    schema="(Tensor x, SymInt[] grid, int factor, bool columns, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
)
_pixel_shuffle.register_kernel("cuda")(pixel_shuffle_triton)

_pixel_shuffle_bwd = torch.library.custom_op(
    "fastmllm::pixel_shuffle_bwd",
    pixel_shuffle_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor? x, Tensor? weight, Tensor? mean, Tensor? rstd, SymInt[] grid, int factor,"
    " bool columns, bool input_grad, bool weight_grad) -> (Tensor, Tensor, Tensor)",
)
_pixel_shuffle_bwd.register_kernel("cuda")(pixel_shuffle_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_pixel_shuffle.register_fake
def _(x, grid, factor, columns, weight, bias, eps):
    y = x.new_empty(x.shape[0] // factor**2, factor**2 * x.shape[1])
    if weight is None:
        return y, x.new_empty(0), x.new_empty(0)
    rows = x.shape[0] if weight.shape[0] == x.shape[1] else y.shape[0]
    mean = x.new_empty(rows, dtype=accumulator_dtype(x.dtype))
    return y, mean, torch.empty_like(mean)


@_pixel_shuffle_bwd.register_fake
def _(grad, x, weight, mean, rstd, grid, factor, columns, input_grad, weight_grad):
    if x is None:
        dx = grad.new_empty(grad.shape[0] * factor**2, grad.shape[1] // factor**2)
        return dx, grad.new_empty(0), grad.new_empty(0)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if input_grad else grad.new_empty(0)
    dw = weight.new_empty(weight.shape if weight_grad else 0)
    return dx, dw, torch.empty_like(dw)


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    x, ctx.grid, ctx.factor, ctx.columns, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*((x, weight, mean, rstd) if weight is not None else ()))
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_mean, _grad_rstd):
    if grad is None:
        return (None,) * 7
    saved = ctx.saved_tensors or (None,) * 4
    input_grad, weight_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
    dx, dw, db = _pixel_shuffle_bwd(
        grad.contiguous(), *saved, ctx.grid, ctx.factor, ctx.columns, input_grad, weight_grad
    )
    return (
        dx if input_grad else None, None, None, None, dw if ctx.needs_input_grad[4] else None,
        db if ctx.has_bias and ctx.needs_input_grad[5] else None, None,
    )  # fmt: skip


_pixel_shuffle.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def pixel_shuffle(
    x: Tensor,
    grid: Grid | None = None,
    factor: int = 2,
    order: str = "rows",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Pack each `factor` x `factor` block of tokens into one token, and normalise it.

    Inside an output token the r^2 tokens stand row by row, each with its D channels.

    Args:
        x: (M, D) tokens of all images, packed, or (I, N, D).
        grid: on the host: of each image (h, w), or (t, h, w) as in `grid_thw`; h and w are multiples of the factor. For
            (I, N, D) None means a square, and one entry means that all images have it. Not read for "merged".
        factor: r.
        order: of the tokens. "rows": in and out row by row (InternVL with ps_version v2, Idefics3, SmolVLM, Llama 4,
            LFM2-VL). "columns": in row by row, out column by column (InternVL with ps_version v1). "merged": the blocks
            already lie one after another, each row by row (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).
        weight: of a LayerNorm, or None for no norm: (r^2 D,) over each output token (InternVL, Qwen3-VL's DeepStack),
            (D,) over each input token (Qwen).
        bias: like `weight`, or None.
        eps: added to the variance.

    Returns:
        (M / r^2, r^2 D), or (I, N / r^2, r^2 D), in the dtype of `x`.

    Raises:
        ValueError: the grids do not fit the tokens or the factor, or shapes, dtypes or devices do not fit together.

    Equal to `pixel_shuffle` of transformers' InternVL, Idefics3 and Llama 4 and to the PatchMerger of Qwen2-VL, each up
    to its first Linear.
    """
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"fastmllm::pixel_shuffle: x {tuple(x.shape)} {x.dtype} must be float (M, D) or (I, N, D)")
    if order not in ORDERS:
        raise ValueError(f"fastmllm::pixel_shuffle: order {order!r} must be one of {ORDERS}")
    if factor < 1:
        raise ValueError(f"fastmllm::pixel_shuffle: factor {factor} must be at least 1")
    _check_norm(x, factor, weight, bias)
    *batch, tokens, width = x.shape
    if tokens % factor**2:
        raise ValueError(f"fastmllm::pixel_shuffle: x {tuple(x.shape)}: {tokens} tokens are no multiple of {factor}^2")
    shape = (*batch, tokens // factor**2, factor**2 * width)
    if order == "merged":
        if weight is None:
            return x.reshape(shape)
        y = layer_norm(x.reshape(-1, weight.numel()), weight, bias, eps=eps)
        assert isinstance(y, Tensor)
        return y.view(shape)
    runs = _runs(x, grid, factor)
    y, _, _ = _pixel_shuffle(x.reshape(-1, width), runs, factor, order == "columns", weight, bias, eps)
    return y.view(shape)


def _check_norm(x: Tensor, factor: int, weight: Tensor | None, bias: Tensor | None) -> None:
    width = x.shape[-1]
    if weight is None:
        if bias is not None:
            raise ValueError(f"fastmllm::pixel_shuffle: bias {tuple(bias.shape)} without a weight")
        return
    if weight.dim() != 1 or weight.numel() not in (width, factor**2 * width) or not weight.is_floating_point():
        raise ValueError(f"fastmllm::pixel_shuffle: weight {tuple(weight.shape)} {weight.dtype} must be float "
                         f"({width},) or ({factor**2 * width},) for x {tuple(x.shape)}, factor {factor}")  # fmt: skip
    if bias is not None and (bias.shape != weight.shape or bias.dtype != weight.dtype):
        raise ValueError(f"fastmllm::pixel_shuffle: bias {tuple(bias.shape)} {bias.dtype} and weight "
                         f"{tuple(weight.shape)} {weight.dtype} differ")  # fmt: skip
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"fastmllm::pixel_shuffle: x {tuple(x.shape)} is on {x.device}, but {name} "
                             f"{tuple(tensor.shape)} is on {tensor.device}: move one of them")  # fmt: skip


def _runs(x: Tensor, grid: Grid | None, factor: int) -> list[int]:
    runs = image_runs("pixel_shuffle", x, grid)
    for _, h, w in runs:
        if h % factor or w % factor:
            raise ValueError(f"fastmllm::pixel_shuffle: grid ({h}, {w}) is no multiple of factor {factor}")
    return join_runs(runs)
