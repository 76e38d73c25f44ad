"""2-D pooling of packed token grids of different sizes: averages of windows, or bilinear interpolation.

Shapes: M tokens written, D width. Both poolings are separable sums, and their weights follow from integers: the mean of
the window [floor(o e / n), ceil((o + 1) e / n)) for output o of n over an extent of e tokens, and the hat function
around ((2 o + 1) e - n) / (2 n). The backward is the same gather in the other direction: no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._runs import Grid, find_run, image_runs, join_runs, upload
from ._triton import accumulator_dtype, cdiv, device_of, next_power_of_2, tl, triton

MODES = ("average", "bilinear")


# 1. reference ---------------------------------------------------------------------------------------------------------
def _parts(runs: Sequence[int]) -> list[tuple[int, int, int, int, int]]:
    """Return of each run the images, height and width of the input, height and width of the output."""
    return list(zip(runs[::5], runs[1::5], runs[2::5], runs[3::5], runs[4::5], strict=True))


def _sizes(runs: Sequence[int]) -> tuple[int, int]:
    """Return the tokens of the input and of the output."""
    parts = _parts(runs)
    return sum(n * h * w for n, h, w, _, _ in parts), sum(n * oh * ow for n, _, _, oh, ow in parts)


def _views(x: Tensor, shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    """Return each run's images as (I, D, h, w) with D innermost in memory: there torch adds up in fp32."""
    parts = x.contiguous().split([n * h * w for n, h, w in shapes])
    return [part.view(*shape, x.shape[1]).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes, strict=True)]


def _pack(parts: list[Tensor], like: Tensor) -> Tensor:
    rows = [part.permute(0, 2, 3, 1).reshape(-1, like.shape[1]).to(like.dtype) for part in parts]
    return torch.cat(rows) if len(rows) > 1 else rows[0].contiguous() if rows else torch.empty_like(like)


def token_pool_reference(x: Tensor, runs: Sequence[int], bilinear: bool, kernel: int) -> Tensor:
    pooled = []
    for image, (*_, oh, ow) in zip(_views(x, [p[:3] for p in _parts(runs)]), _parts(runs), strict=True):
        if bilinear:
            pooled.append(F.interpolate(image, (oh, ow), mode="bilinear", align_corners=False))
        else:
            pooled.append(F.avg_pool2d(image, kernel) if kernel else F.adaptive_avg_pool2d(image, (oh, ow)))
    return _pack(pooled, x)


def token_pool_bwd_reference(grad: Tensor, runs: Sequence[int], bilinear: bool, kernel: int) -> Tensor:
    acc, parts = accumulator_dtype(grad.dtype), []
    shapes = [(n, oh, ow) for n, _, _, oh, ow in _parts(runs)]
    for pooled, (n, h, w, oh, ow) in zip(_views(grad.to(acc), shapes), _parts(runs), strict=True):
        shape = (n, grad.shape[1], h, w)
        if bilinear:
            parts.append(torch.ops.aten.upsample_bilinear2d_backward(pooled, [oh, ow], shape, False))
            continue
        image = pooled.new_empty((n, h, w, grad.shape[1])).permute(0, 3, 1, 2)  # only its shape and layout are read
        if kernel:
            window = [kernel, kernel]
            parts.append(
                torch.ops.aten.avg_pool2d_backward(pooled, image, window, window, [0, 0], False, True, None)
            )  # fmt: skip
        else:
            parts.append(torch.ops.aten._adaptive_avg_pool2d_backward(pooled, image))
    return _pack(parts, grad)


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _weight(o, i, e, n, BILINEAR: tl.constexpr):
    """Return how much output o of n takes of input i of e; 0 outside of both."""
    if BILINEAR:
        place = tl.minimum(tl.maximum((2 * o + 1) * e - n, 0), 2 * n * (e - 1))  # of the output's centre, x 2 n
        share = tl.maximum(2 * n - tl.abs(place - 2 * n * i), 0).to(tl.float32) / (2 * n).to(tl.float32)
    else:
        first = o * e // n
        last = ((o + 1) * e + n - 1) // n
        share = tl.where((i >= first) & (i < last), 1.0 / (last - first).to(tl.float32), 0.0)
    return tl.where((o < n) & (i < e), share, 0.0)


@triton.jit
def _inputs_of(o, e, n, BILINEAR: tl.constexpr):
    """Return the first input that output o takes of, and how many follow it."""
    if BILINEAR:
        first = tl.maximum((2 * o + 1) * e - n, 0) // (2 * n)
        count = tl.minimum(first * 0 + 2, e)
    else:
        first = o * e // n
        count = ((o + 1) * e + n - 1) // n - first
    return first, count


@triton.jit
def _outputs_of(i, e, n, BILINEAR: tl.constexpr):
    """Return the first output that takes of input i, and how many follow it."""
    if BILINEAR:
        before = n * (2 * i - 1) - e
        first = tl.where(before < 0, 0, tl.maximum(before, 0) // (2 * e) + 1)
        last = tl.minimum((n * (2 * i + 3) + e - 1) // (2 * e), n)
    else:
        first = i * n // e
        last = tl.minimum(((i + 1) * n + e - 1) // e, n)
    return first, tl.maximum(last - first, 0)


@triton.jit
def _pool_kernel(
    from_ptr, to_ptr, table_ptr, runs, M, D,
    STEPS: tl.constexpr, BILINEAR: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each token that is written gathers the tokens that it takes of: pooled tokens forward, input tokens backward."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = rows.to(tl.int32)  # tokens are fewer than 2^31, and a division of int64 is a call
    run = find_run(table_ptr, token, runs, STEPS)
    local = token - tl.load(table_ptr + run)
    field_ptr = table_ptr + runs + 1 + run
    source = tl.load(field_ptr).to(tl.int64)
    to_h, to_w = tl.load(field_ptr + runs), tl.load(field_ptr + 2 * runs)
    from_h, from_w = tl.load(field_ptr + 3 * runs), tl.load(field_ptr + 4 * runs)
    extent_h, extent_w = tl.load(field_ptr + 5 * runs), tl.load(field_ptr + 6 * runs)
    source += local // (to_h * to_w) * (from_h * from_w)
    place = local % (to_h * to_w)
    y = place // to_w
    x = place % to_w
    if BACKWARD:
        first_y, count_y = _outputs_of(y, extent_h, from_h, BILINEAR)
        first_x, count_x = _outputs_of(x, extent_w, from_w, BILINEAR)
    else:
        first_y, count_y = _inputs_of(y, extent_h, to_h, BILINEAR)
        first_x, count_x = _inputs_of(x, extent_w, to_w, BILINEAR)
    across = tl.max(tl.where(rows < M, count_x, 0), 0)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for step in range(tl.max(tl.where(rows < M, count_y, 0), 0) * across):
        from_y = first_y + step // across
        from_x = first_x + step % across
        if BACKWARD:
            share = _weight(from_y, y, extent_h, from_h, BILINEAR) * _weight(from_x, x, extent_w, from_w, BILINEAR)
        else:
            share = _weight(y, from_y, extent_h, to_h, BILINEAR) * _weight(x, from_x, extent_w, to_w, BILINEAR)
        mask = ((rows < M) & (share > 0.0))[:, None] & (d < D)[None, :]
        taken = source + from_y * from_w + from_x
        value = tl.load(from_ptr + taken[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += share[:, None] * value
    mask = (rows < M)[:, None] & (d < D)[None, :]
    tl.store(to_ptr + rows[:, None] * D + d[None, :], total.to(to_ptr.dtype.element_ty), mask=mask)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(width: int) -> dict[str, int]:
    block = min(256, next_power_of_2(width))
    return {"BLOCK_M": 1024 // block, "BLOCK_D": block, "num_warps": 4}  # twice the rows would spill


def _table(runs: Sequence[int], kernel: int, backward: bool) -> tuple[tuple[int, ...], int]:
    """Return the numbers that the kernel reads of each run: where it writes and reads, sizes, pooled extents."""
    parts = _parts(runs)
    starts: list[list[int]] = [[0], [0]]
    for n, h, w, oh, ow in parts:
        starts[0].append(starts[0][-1] + n * h * w)
        starts[1].append(starts[1][-1] + n * oh * ow)
    inputs, outputs = ([p[1:3] for p in parts], starts[0]), ([p[3:] for p in parts], starts[1])
    (to, to_starts), (source, from_starts) = (inputs, outputs) if backward else (outputs, inputs)
    # avg_pool2d drops what is left over behind the last whole window
    extents = [(kernel * p[3], kernel * p[4]) if kernel else p[1:3] for p in parts]
    fields = [size[axis] for sizes in (to, source, extents) for axis in (0, 1) for size in sizes]
    return (*to_starts, *from_starts[:-1], *fields), len(parts)


def _pool(source: Tensor, runs: Sequence[int], bilinear: bool, kernel: int, backward: bool) -> Tensor:
    source = source.contiguous()
    sizes, width = _sizes(runs), source.shape[1]
    m = sizes[0 if backward else 1]
    y = source.new_empty((m, width))
    if y.numel():
        values, count = _table(runs, kernel, backward)
        table, config = upload(values, source.device), _config(width)
        with device_of(source):
            _pool_kernel[(cdiv(m, config["BLOCK_M"]), cdiv(width, config["BLOCK_D"]))](
                source, y, table, count, m, width, STEPS=(count - 1).bit_length(), BILINEAR=bilinear,
                BACKWARD=backward, **config,
            )  # fmt: skip
    return y


def token_pool_triton(x: Tensor, runs: Sequence[int], bilinear: bool, kernel: int) -> Tensor:
    if x.dtype == torch.float64:
        return token_pool_reference(x, runs, bilinear, kernel)
    return _pool(x, runs, bilinear, kernel, backward=False)


def token_pool_bwd_triton(grad: Tensor, runs: Sequence[int], bilinear: bool, kernel: int) -> Tensor:
    if grad.dtype == torch.float64:
        return token_pool_bwd_reference(grad, runs, bilinear, kernel)
    return _pool(grad, runs, bilinear, kernel, backward=True)


# 4. operator ----------------------------------------------------------------------------------------------------------
_token_pool = torch.library.custom_op(
    "fastmllm::token_pool",
    token_pool_reference,
    mutates_args=(),
    schema="(Tensor x, SymInt[] runs, bool bilinear, int kernel) -> Tensor",
)
_token_pool.register_kernel("cuda")(token_pool_triton)

_token_pool_bwd = torch.library.custom_op(
    "fastmllm::token_pool_bwd",
    token_pool_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, SymInt[] runs, bool bilinear, int kernel) -> Tensor",
)
_token_pool_bwd.register_kernel("cuda")(token_pool_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_token_pool.register_fake
def _(x, runs, bilinear, kernel):
    return x.new_empty(_sizes(runs)[1], x.shape[1])


@_token_pool_bwd.register_fake
def _(grad, runs, bilinear, kernel):
    return grad.new_empty(_sizes(runs)[0], grad.shape[1])


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    _, *ctx.options = inputs
    ctx.set_materialize_grads(False)


def _backward(ctx, grad):
    if grad is None:
        return None, None, None, None
    return _token_pool_bwd(grad.contiguous(), *ctx.options), None, None, None


_token_pool.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def token_pool(
    x: Tensor,
    grid: Grid | None = None,
    *,
    size: Sequence[int] | Sequence[Sequence[int]] | None = None,
    kernel_size: int | None = None,
    mode: str = "average",
) -> Tensor:
    """Pool each image's grid of tokens to a smaller (or larger) one, all images in one launch.

    Args:
        x: (M, D) tokens of all images, packed row by row, or (I, N, D).
        grid: on the host: of each image (h, w), or (t, h, w) as in `grid_thw`. For (I, N, D) None means a square, and
            one entry means that all images have it.
        size: on the host: (h', w') for all images, or one for each entry of `grid`.
        kernel_size: instead of `size`: k for windows of k x k; rows and columns behind the last whole one are dropped.
        mode: "average" of the window of each output (`size` as in adaptive_avg_pool2d, `kernel_size` as in avg_pool2d)
            or "bilinear" interpolation to `size` (align_corners=False, no antialiasing).

    Returns:
        (M', D) in the dtype of `x`, packed in the order of the images, or (I, N', D).

    Raises:
        ValueError: the grids do not fit the tokens, a size is empty, or neither or both of size and kernel are given.

    Equal to torch.nn.functional.adaptive_avg_pool2d, avg_pool2d and interpolate on each image: LLaVA-OneVision's video
    pooling (bilinear), LLaVA-NeXT-Video and Matryoshka multimodal models (average).
    """
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"fastmllm::token_pool: x {tuple(x.shape)} {x.dtype} must be float (M, D) or (I, N, D)")
    if mode not in MODES:
        raise ValueError(f"fastmllm::token_pool: mode {mode!r} must be one of {MODES}")
    if (size is None) == (kernel_size is None) or (kernel_size is not None and (kernel_size < 1 or mode != "average")):
        raise ValueError(f"fastmllm::token_pool: mode {mode!r} with size {size} and kernel_size {kernel_size}: pass a "
                         "size, or for averages a positive kernel_size")  # fmt: skip
    images = image_runs("token_pool", x, grid)
    sizes = _targets(images, size, kernel_size)
    runs = join_runs([image + target for image, target in zip(images, sizes, strict=True)])
    y = _token_pool(x.reshape(-1, x.shape[-1]), runs, mode == "bilinear", kernel_size or 0)
    if x.dim() == 2:
        return y
    if len(set(sizes)) > 1:
        raise ValueError(f"fastmllm::token_pool: x {tuple(x.shape)} is a batch, but its targets differ: pass (M, D)")
    return y.view(x.shape[0], -1, x.shape[2]) if x.shape[0] else y.view(0, sizes[0][0] * sizes[0][1], x.shape[2])


def _targets(
    images: list[tuple[int, int, int]], size: Sequence[int] | Sequence[Sequence[int]] | None, kernel_size: int | None
) -> list[tuple[int, int]]:
    if kernel_size is not None:
        sizes = [(h // kernel_size, w // kernel_size) for _, h, w in images]
    elif size and isinstance(size[0], int):
        sizes = [tuple(size)] * len(images)  # type: ignore[list-item]
    else:
        sizes = [tuple(target) for target in size or ()]  # type: ignore[misc, arg-type]
    if len(sizes) != len(images) or any(len(target) != 2 or min(target) < 1 for target in sizes):
        raise ValueError(f"fastmllm::token_pool: targets {sizes} must be one positive (h, w) for each of {images}")
    return sizes
