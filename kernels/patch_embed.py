"""Patch embedding straight from pixels: normalise, cut, project, add bias and positions (ViT, arXiv 2010.11929).

Shapes: pixels (I, H, W, C), or (I, C, H, W) where `planar`; P patch, N = (H / P)(W / P) patches an image, D width,
K = P * P * C values a patch in (row, column, channel) order. Packed: one flat buffer of images of different sizes and
their table `grids` (see _grids.py), M patches in all; T frames a patch, K = T * P * P * C with the frame outermost.
A pixel becomes `v * scale[c] + shift[c]` on its way from the image to the product, so no normalised image and, but for
the CPU, no patch matrix is written. (Folding scale and shift into weight and bias costs a pass over K x D in every
step, forward and backward; this costs one multiply-add a loaded value.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native  # noqa: F401 - registers the CPU operator
from ._grids import grid_table, segments
from ._patches import (
    assemble,
    count_patches,
    cut_patches,
    error,
    flatten_images,
    images,
    is_identity,
    locate,
    output_shape,
    patch_rows,
    per_channel,
    prefix_places,
    project,
    value,
    weight_row,
    without_prefix,
)
from ._triton import accumulator_dtype, cdiv, device_of, dot, next_power_of_2, tl, triton
from ._watch import report
from .layer_norm import layer_norm

MAX_OFFSET = 2**31  # patches, and elements of one image, that a kernel counts with 32 bits


# 1. reference ---------------------------------------------------------------------------------------------------------
def patch_embed_reference(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, prefix: Tensor | None,
    grids: Tensor | None, patch_size: int, temporal_patch_size: int, merge_size: int, planar: bool,
    scale: list[float], shift: list[float],
) -> Tensor:  # fmt: skip
    rows = patch_rows(pixels, grids, patch_size, temporal_patch_size, merge_size, planar, scale, shift, weight.dtype)
    if grids is None and position is not None:
        position = position.expand(pixels.shape[0], -1, -1).flatten(0, 1)
    tokens = project(rows, weight, bias, position)
    out = assemble(tokens, prefix, grids, pixels.shape[0])
    return out.view(output_shape(pixels, weight, 0 if prefix is None else prefix.shape[0], grids))


def patch_embed_bwd_reference(
    grad: Tensor, pixels: Tensor, weight: Tensor, patch_size: int, pixel_grad: bool, weight_grad: bool,
    grids: Tensor | None, prefix_rows: int, temporal_patch_size: int, merge_size: int, planar: bool,
    scale: list[float], shift: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad = without_prefix(grad, pixels, weight, grids, prefix_rows)  # (M, D)
    shape = (grids, patch_size, temporal_patch_size)
    dx, dw = pixels.new_empty(0), weight.new_empty(0)
    if pixel_grad:
        dx = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        dr = torch.mm(grad, weight.t()).to(accumulator_dtype(weight.dtype))
        start, factor = 0, dr.new_tensor(scale)
        for image in images(dx, *shape, planar, weight.shape[0]):
            cut = cut_patches(image, patch_size, merge_size)
            stop = start + image.numel() // max(weight.shape[0], 1)
            cut.copy_(dr[start:stop].view(cut.shape) * factor)
            start = stop
    if weight_grad:
        rows = patch_rows(pixels, *shape, merge_size, planar, scale, shift, weight.dtype)
        dw = torch.mm(rows.t(), grad)
    return dx, dw


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _fwd_kernel(
    x_ptr, w_ptr, b_ptr, p_ptr, y_ptr, grids_ptr, scale, shift, M, N, D, GRID_W, S, R: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, T: tl.constexpr, MERGE: tl.constexpr, PLANAR: tl.constexpr, BITS: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POSITION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = T * P * P * C
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    base, pitch, plane, y_rows = locate(rows, grids_ptr, S, N, GRID_W, R, P, C, T, MERGE, PLANAR, BITS)
    if BITS > 0:
        pitch, plane = pitch[:, None], plane[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (rows < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + base[:, None] + value(k[None, :], pitch, plane, P, C, T, PLANAR), mask=mask, other=0)
        w_rows = weight_row(k, P, C, PLANAR)
        w = tl.load(w_ptr + w_rows[:, None] * D + cols[None, :], mask=(k < K)[:, None] & (cols < D)[None, :], other=0.0)
        if NORMALIZE:
            scales, shifts = per_channel(scale, k, P, C, PLANAR), per_channel(shift, k, P, C, PLANAR)
            x = x.to(tl.float32) * scales[None, :] + shifts[None, :]
        acc = dot(x.to(dtype), w, acc)  # where k >= K, w is 0
    mask = (rows < M)[:, None] & (cols < D)[None, :]
    if HAS_BIAS:
        acc += tl.load(b_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if HAS_POSITION:
        p_rows = rows if BITS > 0 else rows.to(tl.int32) % N
        acc += tl.load(p_ptr + p_rows[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_rows[:, None] * D + cols[None, :], acc.to(dtype), mask=mask)


@triton.jit
def _prefix_kernel(prefix_ptr, y_ptr, grids_ptr, N, D, R, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """Each program writes one row in front of one segment."""
    segment, row = tl.program_id(0).to(tl.int64) // R, tl.program_id(0) % R
    first = tl.load(grids_ptr + segment).to(tl.int64) if PACKED else segment * N
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(prefix_ptr + row * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + (first + segment * R + row) * D + cols, token.to(y_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def _rows_kernel(
    table_ptr, grids_ptr, M, S, R: tl.constexpr, P: tl.constexpr, C: tl.constexpr, T: tl.constexpr, MERGE: tl.constexpr,
    PLANAR: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what `locate` knows of each packed patch, in runs: the sum over rows need not search in its loop."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    base, pitch, plane, y_rows = locate(rows, grids_ptr, S, 1, 1, R, P, C, T, MERGE, PLANAR, BITS)
    run: tl.constexpr = P if PLANAR else P * C
    tl.store(table_ptr + rows, base // run, mask=rows < M)
    tl.store(table_ptr + M + rows, y_rows, mask=rows < M)
    tl.store(table_ptr + 2 * M + rows, (pitch // run).to(tl.int64), mask=rows < M)
    tl.store(table_ptr + 3 * M + rows, (plane // (P * P)).to(tl.int64), mask=rows < M)


@triton.jit
def _bwd_weight_kernel(
    dy_ptr, x_ptr, dw_ptr, table_ptr, scale, shift, M, N, D, GRID_W, R: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, T: tl.constexpr, MERGE: tl.constexpr, PLANAR: tl.constexpr, BITS: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each program along the third axis takes its share of the rows and writes its part of dw."""
    K: tl.constexpr = T * P * P * C
    RUN: tl.constexpr = P if PLANAR else P * C
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    scales, shifts = per_channel(scale, k, P, C, PLANAR), per_channel(shift, k, P, C, PLANAR)
    step = value(k, GRID_W * RUN, N * (P * P), P, C, T, PLANAR)  # for images of one size
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in range(part * BLOCK_M, M, tl.num_programs(2) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # `start` is a Python int in the interpreter
        if BITS > 0:
            base = tl.load(table_ptr + rows, mask=rows < M, other=0) * RUN  # the factor tells the compiler an alignment
            y_rows = tl.load(table_ptr + M + rows, mask=rows < M, other=0)
            pitch = tl.load(table_ptr + 2 * M + rows, mask=rows < M, other=0).to(tl.int32) * RUN
            plane = tl.load(table_ptr + 3 * M + rows, mask=rows < M, other=0).to(tl.int32) * (P * P)
            offsets = value(k[:, None], pitch[None, :], plane[None, :], P, C, T, PLANAR) + base[None, :]
        else:
            base, _, _, y_rows = locate(rows, None, 0, N, GRID_W, R, P, C, T, MERGE, PLANAR, BITS)
            offsets = step[:, None] + base[None, :]
        x = tl.load(x_ptr + offsets, mask=(k < K)[:, None] & (rows < M)[None, :], other=0)
        dy = tl.load(
            dy_ptr + y_rows[:, None] * D + cols[None, :], mask=(rows < M)[:, None] & (cols < D)[None, :], other=0.0
        )
        if NORMALIZE:
            x = x.to(tl.float32) * scales[:, None] + shifts[:, None]
        acc = dot(x.to(dy_ptr.dtype.element_ty), dy, acc)  # where rows >= M, dy is 0
    offsets = (part.to(tl.int64) * K + weight_row(k, P, C, PLANAR)[:, None]) * D + cols[None, :]
    tl.store(dw_ptr + offsets, acc, mask=(k < K)[:, None] & (cols < D)[None, :])


@triton.jit
def _bwd_pixels_kernel(
    dy_ptr, w_ptr, dx_ptr, grids_ptr, scale, M, N, D, GRID_W, S, R: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, T: tl.constexpr, MERGE: tl.constexpr, PLANAR: tl.constexpr, BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every pixel lies in one patch, so each program writes its own."""
    K: tl.constexpr = T * P * P * C
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    base, pitch, plane, y_rows = locate(rows, grids_ptr, S, N, GRID_W, R, P, C, T, MERGE, PLANAR, BITS)
    w_rows = weight_row(k, P, C, PLANAR)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        dy = tl.load(
            dy_ptr + y_rows[:, None] * D + cols[None, :], mask=(rows < M)[:, None] & (cols < D)[None, :], other=0.0
        )
        w = tl.load(w_ptr + w_rows[None, :] * D + cols[:, None], mask=(k < K)[None, :] & (cols < D)[:, None], other=0.0)
        acc = dot(dy, w, acc)
    acc *= per_channel(scale, k, P, C, PLANAR)[None, :]
    if BITS > 0:
        pitch, plane = pitch[:, None], plane[:, None]
    mask = (rows < M)[:, None] & (k < K)[None, :]
    offsets = base[:, None] + value(k[None, :], pitch, plane, P, C, T, PLANAR)
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=mask)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(rows: int, cols: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of a (rows, cols) product.

    The rows choose how many values a program takes, never the order of one value's sum (BLOCK_K): an image has the
    same bits alone and in any batch.
    """
    block_n = max(16, min(64, next_power_of_2(cols)))
    if dtype not in (torch.bfloat16, torch.float16):  # fp32 runs outside the tensor cores
        return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if cdiv(rows, 128) * cdiv(cols, 128) < 132:  # fewer tiles than the largest part has processors
        return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _has_kernel(pixels: Tensor, weight: Tensor, grids: Tensor | None) -> bool:
    _, m = count_patches(pixels, weight, grids)
    return weight.dtype != torch.float64 and m < MAX_OFFSET and (grids is not None or pixels[:1].numel() < MAX_OFFSET)


def _sizes(pixels: Tensor, weight: Tensor, grids: Tensor | None, patch: int, planar: bool) -> tuple[int, ...]:
    """Return M, N, D, the patches side by side, and S."""
    count, m = count_patches(pixels, weight, grids)
    if grids is not None:
        return m, 1, weight.shape[1], 1, count
    return m, max(m // max(count, 1), 1), weight.shape[1], pixels.shape[3 if planar else 2] // patch, count


def _constants(weight: Tensor, grids: Tensor | None, patch: int, frames: int, merge: int, planar: bool):
    """Return the constants that every kernel takes."""
    bits = 0 if grids is None else (grids.shape[1] - 1).bit_length()
    channels = weight.shape[0] // (frames * patch * patch)
    return {"P": patch, "C": channels, "T": frames, "MERGE": merge, "PLANAR": planar, "BITS": bits}


def patch_embed_triton(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, prefix: Tensor | None,
    grids: Tensor | None, patch_size: int, temporal_patch_size: int, merge_size: int, planar: bool,
    scale: list[float], shift: list[float],
) -> Tensor:  # fmt: skip
    if not _has_kernel(pixels, weight, grids):
        return patch_embed_reference(pixels, weight, bias, position, prefix, grids, patch_size, temporal_patch_size,
                                     merge_size, planar, scale, shift)  # fmt: skip
    m, n, d, grid_w, s = _sizes(pixels, weight, grids, patch_size, planar)
    r = 0 if prefix is None else prefix.shape[0]
    pixels, weight = pixels.contiguous(), weight.contiguous()
    bias, position, prefix = (None if t is None else t.contiguous() for t in (bias, position, prefix))
    y = torch.empty(output_shape(pixels, weight, r, grids), dtype=weight.dtype, device=weight.device)
    config = _config(m, d, weight.dtype)
    if grids is not None and pixels.dtype == torch.uint8:
        config["BLOCK_K"] = 32  # each row has its own pitch: leaves registers to the addresses
    with device_of(pixels):
        if m and d:
            _fwd_kernel[(cdiv(m, config["BLOCK_M"]), cdiv(d, config["BLOCK_N"]))](
                pixels, weight, bias, position, y, grids, tuple(scale), tuple(shift), m, n, d, grid_w, s, r,
                **_constants(weight, grids, patch_size, temporal_patch_size, merge_size, planar),
                NORMALIZE=not is_identity(scale, shift), HAS_BIAS=bias is not None,
                HAS_POSITION=position is not None, **config,
            )  # fmt: skip
        if s * r and d:
            _prefix_kernel[(s * r, cdiv(d, 1024))](prefix, y, grids, n if m else 0, d, r, PACKED=grids is not None,
                                                   BLOCK=1024)  # fmt: skip
    return y


def patch_embed_bwd_triton(
    grad: Tensor, pixels: Tensor, weight: Tensor, patch_size: int, pixel_grad: bool, weight_grad: bool,
    grids: Tensor | None, prefix_rows: int, temporal_patch_size: int, merge_size: int, planar: bool,
    scale: list[float], shift: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not _has_kernel(pixels, weight, grids):
        return patch_embed_bwd_reference(grad, pixels, weight, patch_size, pixel_grad, weight_grad, grids, prefix_rows,
                                         temporal_patch_size, merge_size, planar, scale, shift)  # fmt: skip
    m, n, d, grid_w, s = _sizes(pixels, weight, grids, patch_size, planar)
    grad, pixels, weight = grad.contiguous(), pixels.contiguous(), weight.contiguous()
    k, constants = weight.shape[0], _constants(weight, grids, patch_size, temporal_patch_size, merge_size, planar)
    dx, dw = pixels.new_empty(0), weight.new_empty(0)
    with device_of(pixels):
        if pixel_grad:
            dx = torch.empty_like(pixels) if d else torch.zeros_like(pixels)
            config = _config(m, k, weight.dtype)
            config["BLOCK_N"] = min(config["BLOCK_N"], 64)  # leaves registers to the addresses of the scattered store
            if m and d:
                _bwd_pixels_kernel[(cdiv(m, config["BLOCK_M"]), cdiv(k, config["BLOCK_N"]))](
                    grad, weight, dx, grids, tuple(scale), m, n, d, grid_w, s, prefix_rows, **constants, **config
                )
        if weight_grad and not (m and d):
            dw = torch.zeros_like(weight)
        elif weight_grad:
            config = _config(k, d, weight.dtype)
            config["BLOCK_M"], config["BLOCK_K"] = config["BLOCK_K"], config["BLOCK_M"]  # the sum runs over the rows
            tiles = cdiv(k, config["BLOCK_K"]) * cdiv(d, config["BLOCK_N"])
            parts = max(1, min(264 // max(tiles, 1), cdiv(m, 4 * config["BLOCK_M"])))
            partial = torch.empty((parts, k, d), dtype=torch.float32, device=weight.device)
            table = None
            if grids is not None:
                table = grids.new_empty((4, m), dtype=torch.int64)
                _rows_kernel[(cdiv(m, 1024),)](table, grids, m, s, prefix_rows, **constants, BLOCK=1024)
            _bwd_weight_kernel[(cdiv(k, config["BLOCK_K"]), cdiv(d, config["BLOCK_N"]), parts)](
                grad, pixels, partial, table, tuple(scale), tuple(shift), m, n, d, grid_w, prefix_rows,
                **constants, NORMALIZE=not is_identity(scale, shift), **config,
            )  # fmt: skip
            dw = partial.sum(0).to(weight.dtype)
    return dx, dw


# 4. operator ----------------------------------------------------------------------------------------------------------
_patch_embed = torch.library.custom_op(
    "fastmllm::patch_embed",
    patch_embed_reference,
    mutates_args=(),
    schema="(Tensor pixels, Tensor weight, Tensor? bias, Tensor? position, Tensor? prefix, Tensor? grids,"
    " int patch_size, int temporal_patch_size, int merge_size, bool planar, float[] scale, float[] shift) -> Tensor",
)
_patch_embed.register_kernel("cuda")(patch_embed_triton)

_patch_embed_bwd = torch.library.custom_op(
    "fastmllm::patch_embed_bwd",
    patch_embed_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor pixels, Tensor weight, int patch_size, bool pixel_grad, bool weight_grad,"
    " Tensor? grids, *, int prefix_rows, int temporal_patch_size, int merge_size, bool planar, float[] scale,"
    " float[] shift) -> (Tensor, Tensor)",
)
_patch_embed_bwd.register_kernel("cuda")(patch_embed_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_patch_embed.register_fake
def _(pixels, weight, bias, position, prefix, grids, patch_size, temporal_patch_size, merge_size, planar, scale, shift):
    return weight.new_empty(output_shape(pixels, weight, 0 if prefix is None else prefix.shape[0], grids))


@_patch_embed_bwd.register_fake
def _(grad, pixels, weight, patch_size, pixel_grad, weight_grad, grids, **_):
    dx = pixels.new_empty(pixels.shape if pixel_grad else 0)
    return dx, weight.new_empty(weight.shape if weight_grad else 0)


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    pixels, weight, bias, position, prefix, grids, ctx.patch_size, *rest = inputs
    ctx.temporal_patch_size, ctx.merge_size, ctx.planar, ctx.scale, ctx.shift = rest
    ctx.save_for_backward(pixels, weight, grids)
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, position, prefix)]
    ctx.prefix_rows = 0 if prefix is None else prefix.shape[0]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad):
    need_pixels, need_weight, need_bias, need_position, need_prefix, *_ = ctx.needs_input_grad
    if grad is None:
        return (None,) * 12
    pixels, weight, grids = ctx.saved_tensors
    grad, r, acc = grad.contiguous(), ctx.prefix_rows, accumulator_dtype(grad.dtype)
    bias_dtype, position_dtype, prefix_dtype = ctx.dtypes
    dx = dw = db = dp = dprefix = None
    if need_pixels or need_weight:
        dx, dw = _patch_embed_bwd(
            grad, pixels, weight, ctx.patch_size, need_pixels, need_weight, grids, prefix_rows=r,
            temporal_patch_size=ctx.temporal_patch_size, merge_size=ctx.merge_size, planar=ctx.planar,
            scale=ctx.scale, shift=ctx.shift,
        )  # fmt: skip
    if need_bias or need_position:  # plain reductions need no kernel of ours
        if grids is None:
            total = grad[:, r:].sum(0, dtype=acc)  # (N, D)
        else:
            total = without_prefix(grad, pixels, weight, grids, r)  # (M, D)
        db = total.sum(0, dtype=acc).to(bias_dtype) if need_bias else None
        dp = total.to(position_dtype) if need_position else None
    if need_prefix:
        rows = grad[:, :r] if grids is None else grad[prefix_places(grids, r)]  # (S, R, D)
        dprefix = rows.sum(0, dtype=acc).to(prefix_dtype)
    return (dx if need_pixels else None, dw if need_weight else None, db, dp, dprefix, *(None,) * 7)


_patch_embed.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def _check(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, prefix: Tensor | None, tokens: int,
    size: int, layout: str,
) -> None:  # fmt: skip
    """Check what the dense and the packed form share: `tokens` positions, patches of `size` values."""
    width = weight.shape[1]
    if layout not in ("hwc", "chw"):
        raise error(f"layout must be 'hwc' or 'chw', not {layout!r}")
    if not weight.is_floating_point() or not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
        raise error(f"pixels must be uint8 or float and weight float, but they are {pixels.dtype} and {weight.dtype}")
    if weight.shape[0] != size:
        raise error(f"weight {tuple(weight.shape)} must have {size} rows for pixels {tuple(pixels.shape)}")
    if bias is not None and bias.shape != (width,):
        raise error(f"bias {tuple(bias.shape)} and weight {tuple(weight.shape)} differ")
    if position is not None and position.shape != (tokens, width):
        raise error(f"position {tuple(position.shape)} must be {(tokens, width)} for pixels {tuple(pixels.shape)}: "
                     "position_resample brings a table to other grids")  # fmt: skip
    if prefix is not None and (prefix.dim() != 2 or prefix.shape[1] != width):
        raise error(f"prefix {tuple(prefix.shape)} must be (R, {width})")
    for name, t in (("weight", weight), ("bias", bias), ("position", position), ("prefix", prefix)):
        if t is not None and t.device != pixels.device:
            raise error(f"pixels {tuple(pixels.shape)} are on {pixels.device}, but {name} is on {t.device}: move one")


def _affine(
    pixels: Tensor, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Return scale and shift, one a channel."""
    for name, t in (("mean", mean), ("std", std)):
        if t is not None and len(t) != channels:
            raise error(f"{name} has {len(t)} values for pixels {tuple(pixels.shape)} of {channels} channels")
    if std is not None and not all(std):
        raise error(f"std {list(std)} must not be zero")
    unit = 1 / 255 if pixels.dtype == torch.uint8 else 1.0
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    return [unit / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def _norm(tokens: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is None and bias is not None:
        raise error(f"norm_bias {tuple(bias.shape)} needs a norm_weight: ones, where there is no other")
    return tokens if weight is None else layer_norm(tokens, weight, bias, eps=eps)  # type: ignore[return-value]


def patch_embed(
    pixels: Tensor, weight: Tensor, bias: Tensor | None = None, position: Tensor | None = None, *,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None, patch_size: int, layout: str = "hwc",
    prefix: Tensor | None = None, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Normalise pixels, cut them into patches, project, add bias and positions.

    Args:
        pixels: (I, H, W, C), or (I, C, H, W) where `layout` is "chw"; uint8, read as v / 255, or floats in 0..1.
        weight: (K, D) projection, K = P * P * C in (row, column, channel) order in both layouts: `patch_weight`.
        bias: (D,), or None.
        position: (N, D) added to every image, or None; `position_resample` brings a table to the image's grid.
        mean: C numbers subtracted, in units of 0..1, or None.
        std: C numbers divided by, in units of 0..1, or None.
        patch_size: P, in pixels.
        layout: "hwc" or "chw".
        prefix: (R, D) rows put before each image, or None: a class token with its position, register tokens.
        norm_weight, norm_bias: (D,) of a LayerNorm over the finished tokens, the prefix included, or None: CLIP's
            `pre_layrnorm`. It is one launch more: a row of the product spans several tiles.
        norm_eps: its epsilon.

    Returns:
        (I, R + N, D) in the dtype of `weight`, patches in row-major order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Equal to the image processor and the embeddings of CLIP, SigLIP and DINOv2.
    """
    chw = layout == "chw"
    if pixels.dim() != 4 or weight.dim() != 2:
        shape = "(I, C, H, W)" if chw else "(I, H, W, C)"
        raise error(f"pixels must be {shape} and weight (K, D), but they are {tuple(pixels.shape)} and "
                     f"{tuple(weight.shape)}")  # fmt: skip
    channels, height, width = (pixels.shape[i] for i in ((1, 2, 3) if chw else (3, 1, 2)))
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise error(f"pixels {tuple(pixels.shape)} in layout {layout!r} are not a whole number of {patch_size} x "
                     f"{patch_size} patches: resize or pad the images to multiples of {patch_size}")  # fmt: skip
    n = (height // patch_size) * (width // patch_size)
    _check(pixels, weight, bias, position, prefix, n, patch_size * patch_size * channels, layout)
    affine = _affine(pixels, channels, mean, std)
    tokens = _patch_embed(pixels, weight, bias, position, prefix, None, patch_size, 1, 1, chw, *affine)
    report("patch_embed", pixels, weight)
    return _norm(tokens, norm_weight, norm_bias, norm_eps)


def patch_embed_packed(
    pixels: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, position: Tensor | None = None, *,
    grid_thw: Sequence[Sequence[int]] | Tensor | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, patch_size: int, temporal_patch_size: int = 1, merge_size: int = 1,
    layout: str = "hwc", still: bool = False, prefix: Tensor | None = None, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Embed images and videos of different sizes in one launch.

    Args:
        pixels: images (H, W, C) and videos (F, H, W, C), one after the other in a flat buffer, or a list of them
            (concatenated by a copy); or patches (M, K) that a processor has cut and normalised. In layout "chw":
            (C, H, W) and (F, C, H, W). uint8, read as v / 255, or floats in 0..1.
        weight: (K, D). Of images: K = T * P * P * C in (frame, row, column, channel) order. Of patches: in theirs,
            `patch_weight(w, order="chw")` for what transformers cuts for Qwen-VL.
        bias: (D,), or None.
        position: (M, D) of all patches, or None: `position_resample`.
        grid_thw: (t, h, w) or (h, w) patches of each image, on the host; not needed for a list.
        mean, std: C numbers each in units of 0..1, or None; None for patches.
        patch_size: P, in pixels.
        temporal_patch_size: T, frames a patch.
        merge_size: patches come in blocks of merge_size x merge_size, as Qwen-VL's merger takes them; 1 is row-major.
        layout: "hwc" or "chw"; of patches, the order of their values.
        still: patches only: their T frames are equal, so only the first is read, and `weight` is one frame's,
            `patch_weight(w, order="chw", still=True)`: exact, at half the work.
        prefix: (R, D) rows put before each frame's patches, or None.
        norm_weight, norm_bias, norm_eps: a LayerNorm over the finished tokens, as in `patch_embed`.

    Returns:
        tokens (M + S * R, D) in the dtype of `weight`, and cu_seqlens (S + 1,) int32 with a segment a frame.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Equal to the processors and patch embeddings of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and SigLIP2-NaFlex.
    """
    t, p, chw = temporal_patch_size, patch_size, layout == "chw"
    if weight.dim() != 2 or min(t, p, merge_size) < 1:
        raise error(f"weight {tuple(weight.shape)} must be (K, D), and {patch_size=}, {temporal_patch_size=}, "
                     f"{merge_size=} at least 1")  # fmt: skip
    if not isinstance(pixels, Tensor):
        if grid_thw is not None:
            raise error("a list of images has its own grids: leave grid_thw out")
        pixels, grid_thw = flatten_images(pixels, p, t, layout, weight.device)
    if grid_thw is None or pixels.dim() not in (1, 2):
        raise error(f"pixels {tuple(pixels.shape)} must be a list of images, or flat or (M, K) with their grid_thw")
    sizes = segments("patch_embed", grid_thw)
    if any(h % merge_size or w % merge_size for h, w in sizes):
        raise error(f"grids {sizes[:8]} must be multiples of merge_size {merge_size}")
    m, r, frames = sum(h * w for h, w in sizes), 0 if prefix is None else prefix.shape[0], 1 if still else t
    channels = weight.shape[0] // (frames * p * p)
    size = frames * p * p * channels
    _check(pixels, weight, bias, position, prefix, m, size, layout)
    grids = grid_table(sizes, r, pixels.device)
    if pixels.dim() == 2:
        values = size // frames * t
        if pixels.shape != (m, values) or mean is not None or std is not None or not pixels.is_floating_point():
            raise error(f"patches {tuple(pixels.shape)} {pixels.dtype} must be float {(m, values)}, already "
                         "normalised: no mean and std")  # fmt: skip
        if still:
            shape = (m, channels, t, p * p) if chw else (m, 1, t, p * p * channels)
            pixels = pixels.view(shape)[:, :, 0].reshape(m, size)
        tokens = assemble(project(pixels.to(weight.dtype), weight, bias, position), prefix, grids, len(sizes))
        report("patch_embed", pixels, weight)
        return _norm(tokens, norm_weight, norm_bias, norm_eps), grids[3].clone()
    if still:
        raise error("pixels of a still image are one frame: leave still out and fold the weight, "
                     "patch_weight(w, still=True)")  # fmt: skip
    if pixels.numel() != m * size:
        raise error(f"pixels {tuple(pixels.shape)} must have {m} * {size} values for grids {sizes[:8]}")
    if any(h * w * size >= MAX_OFFSET for h, w in sizes):
        raise error(f"an image of {max(sizes)} patches exceeds the kernel's {MAX_OFFSET} values")
    affine = _affine(pixels, channels, mean, std)
    tokens = _patch_embed(pixels, weight, bias, position, prefix, grids, p, t, merge_size, chw, *affine)
    report("patch_embed", pixels, weight)
    return _norm(tokens, norm_weight, norm_bias, norm_eps), grids[3].clone()


def patch_weight(weight: Tensor, order: str = "hwc", still: bool = False) -> Tensor:
    """Turn a convolution's weight into a matrix.

    Args:
        weight: (D, C, P, P), or (D, C, T, P, P).
        order: "hwc" for images in either layout; "chw" for patches that a processor has cut (a view, no copy).
        still: sum over T, for images that would be repeated over T frames: exact, with gradient to every frame.

    Returns:
        (K, D), K in (frame, row, column, channel) or (channel, frame, row, column) order.

    Raises:
        ValueError: `weight` is no convolution's, or `order` is unknown.
    """
    if weight.dim() not in (4, 5) or order not in ("hwc", "chw"):
        raise error(f"a convolution's weight must be (D, C, P, P) or (D, C, T, P, P) and order 'hwc' or 'chw', but "
                     f"they are {tuple(weight.shape)} and {order!r}")  # fmt: skip
    if weight.dim() == 4:
        weight = weight.unsqueeze(2)
    if still:
        weight = weight.sum(2, keepdim=True)
    return (weight if order == "chw" else weight.permute(0, 2, 3, 4, 1)).flatten(1).t()
