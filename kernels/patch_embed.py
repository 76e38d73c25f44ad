"""Patch embedding straight from pixels: normalise, cut, project, add bias and positions (ViT, arXiv 2010.11929).

Shapes: pixels (I, H, W, C), P patch, N = (H / P)(W / P) patches an image, D width, K = P * P * C values a patch in
(row, column, channel) order. A pixel becomes `v * scale[c] + shift[c]` on its way from the image to the product, so no
normalised image and, but for the CPU, no patch matrix is written. (Folding scale and shift into weight and bias costs a
pass over K x D in every step, forward and backward; this costs one multiply-add a loaded value.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native  # noqa: F401 - registers the CPU operator
from ._triton import accumulator_dtype, cdiv, device_of, dot, next_power_of_2, tl, triton

MAX_OFFSET = 2**31  # elements of one image that a kernel addresses with 32 bits


def _output_shape(pixels: Tensor, weight: Tensor, patch_size: int) -> tuple[int, int, int]:
    images, height, width, _ = pixels.shape
    return images, (height // patch_size) * (width // patch_size), weight.shape[1]


def _is_identity(scale: list[float], shift: list[float]) -> bool:
    return all(s == 1 for s in scale) and not any(shift)


# 1. reference ---------------------------------------------------------------------------------------------------------
def _rows(pixels: Tensor, patch_size: int, scale: list[float], shift: list[float], dtype: torch.dtype) -> Tensor:
    """Return the normalised patches (I * N, K)."""
    images, height, width, channels = pixels.shape
    size = patch_size * patch_size * channels
    if pixels.dtype == torch.uint8 or not _is_identity(scale, shift):
        acc = accumulator_dtype(dtype)
        scales, shifts = (torch.tensor(t, dtype=acc, device=pixels.device) for t in (scale, shift))
        pixels = torch.addcmul(shifts, pixels.to(acc), scales)
    grid = (images, height // patch_size, patch_size, width // patch_size, patch_size * channels)
    return pixels.reshape(grid).transpose(2, 3).to(dtype).reshape(pixels.numel() // size, size)


def patch_embed_reference(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, patch_size: int,
    scale: list[float], shift: list[float],
) -> Tensor:  # fmt: skip
    rows = _rows(pixels, patch_size, scale, shift, weight.dtype)
    shape = _output_shape(pixels, weight, patch_size)
    acc = accumulator_dtype(weight.dtype)
    added = [t.to(acc) for t in (position, bias) if t is not None]
    if not added:
        return torch.mm(rows, weight).view(shape)
    offset = (added[0] + added[1] if len(added) == 2 else added[0]).to(weight.dtype)  # (N, D) or (D,)
    return torch.addmm(offset.expand(shape).flatten(0, 1), rows, weight).view(shape)


def patch_embed_bwd_reference(
    grad: Tensor, pixels: Tensor, weight: Tensor, patch_size: int, pixel_grad: bool, weight_grad: bool,
    scale: list[float], shift: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad = grad.reshape(-1, weight.shape[1])  # (I * N, D)
    dx, dw = pixels.new_empty(0), weight.new_empty(0)
    if pixel_grad:
        images, height, width, channels = pixels.shape
        grid = (images, height // patch_size, width // patch_size, patch_size, patch_size * channels)
        dx = torch.mm(grad, weight.t()).to(accumulator_dtype(weight.dtype)).view(grid).transpose(2, 3)
        dx = (dx.reshape(pixels.shape) * dx.new_tensor(scale)).to(pixels.dtype)
    if weight_grad:
        dw = torch.mm(_rows(pixels, patch_size, scale, shift, weight.dtype).t(), grad)
    return dx, dw


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
# A patch row is P runs of P * C consecutive values. P and C are constants, so the compiler proves how far a run is
# aligned and loads whole words: 16 bytes of uint8 for P = 16, pairs for P = 14 (runs of 42 bytes start at even bytes).
@triton.jit
def _pixel_base(rows, N, GRID_W, P: tl.constexpr, C: tl.constexpr):
    """Return where patch `rows` starts; GRID_W patches lie side by side, so an image row has GRID_W * P * C values."""
    image, patch = rows // N, rows % N
    return (image * N * P + (patch // GRID_W) * GRID_W * P) * (P * C) + (patch % GRID_W) * (P * C)


@triton.jit
def _pixel_step(k, GRID_W, P: tl.constexpr, C: tl.constexpr):
    """Return where value `k` of a patch lies, from the start of the patch."""
    return (k // (P * C)) * (GRID_W * (P * C)) + k % (P * C)


@triton.jit
def _per_channel(values, k, C: tl.constexpr):
    """Return values[k % C]; they are kernel arguments, so nothing is copied to the device."""
    out = tl.zeros(k.shape, tl.float32)
    for c in tl.static_range(C):
        out = tl.where(k % C == c, values[c], out)
    return out


@triton.jit
def _fwd_kernel(
    x_ptr, w_ptr, b_ptr, p_ptr, y_ptr, scale, shift, M, N, D, GRID_W,
    P: tl.constexpr, C: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POSITION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = P * P * C
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    base = _pixel_base(rows, N, GRID_W, P, C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (rows < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + base[:, None] + _pixel_step(k, GRID_W, P, C)[None, :], mask=mask, other=0)
        w = tl.load(w_ptr + k[:, None] * D + cols[None, :], mask=(k < K)[:, None] & (cols < D)[None, :], other=0.0)
        if NORMALIZE:
            x = x.to(tl.float32) * _per_channel(scale, k, C)[None, :] + _per_channel(shift, k, C)[None, :]
        acc = dot(x.to(dtype), w, acc)  # where k >= K, w is 0
    mask = (rows < M)[:, None] & (cols < D)[None, :]
    if HAS_BIAS:
        acc += tl.load(b_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if HAS_POSITION:
        acc += tl.load(p_ptr + (rows % N)[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], acc.to(dtype), mask=mask)


@triton.jit
def _bwd_weight_kernel(
    dy_ptr, x_ptr, dw_ptr, scale, shift, M, N, D, GRID_W,
    P: tl.constexpr, C: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each program along the third axis takes its share of the rows and writes its part of dw."""
    K: tl.constexpr = P * P * C
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    step = _pixel_step(k, GRID_W, P, C)
    scales, shifts = _per_channel(scale, k, C), _per_channel(shift, k, C)
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in range(part * BLOCK_M, M, tl.num_programs(2) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # `start` is a Python int in the interpreter
        base = _pixel_base(rows, N, GRID_W, P, C)
        x = tl.load(x_ptr + step[:, None] + base[None, :], mask=(k < K)[:, None] & (rows < M)[None, :], other=0)
        dy = tl.load(
            dy_ptr + rows[:, None] * D + cols[None, :], mask=(rows < M)[:, None] & (cols < D)[None, :], other=0.0
        )
        if NORMALIZE:
            x = x.to(tl.float32) * scales[:, None] + shifts[:, None]
        acc = dot(x.to(dy_ptr.dtype.element_ty), dy, acc)  # where rows >= M, dy is 0
    offsets = (part.to(tl.int64) * K + k[:, None]) * D + cols[None, :]
    tl.store(dw_ptr + offsets, acc, mask=(k < K)[:, None] & (cols < D)[None, :])


@triton.jit
def _bwd_pixels_kernel(
    dy_ptr, w_ptr, dx_ptr, scale, M, N, D, GRID_W, P: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every pixel lies in one patch, so each program writes its own."""
    K: tl.constexpr = P * P * C
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        dy = tl.load(
            dy_ptr + rows[:, None] * D + cols[None, :], mask=(rows < M)[:, None] & (cols < D)[None, :], other=0.0
        )
        w = tl.load(w_ptr + k[None, :] * D + cols[:, None], mask=(k < K)[None, :] & (cols < D)[:, None], other=0.0)
        acc = dot(dy, w, acc)
    acc *= _per_channel(scale, k, C)[None, :]
    base = _pixel_base(rows, N, GRID_W, P, C)
    mask = (rows < M)[:, None] & (k < K)[None, :]
    offsets = base[:, None] + _pixel_step(k, GRID_W, P, C)[None, :]
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=mask)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(rows: int, cols: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of a (rows, cols) product."""
    block_n = max(16, min(64, next_power_of_2(cols)))
    if dtype not in (torch.bfloat16, torch.float16):  # fp32 runs outside the tensor cores
        return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if cdiv(rows, 128) * cdiv(cols, 128) < 132:  # fewer tiles than the largest part has processors
        return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _sizes(pixels: Tensor, weight: Tensor, patch_size: int) -> tuple[int, int, int, int]:
    """Return M = I * N, N, D and the patches side by side."""
    images, patches, width = _output_shape(pixels, weight, patch_size)
    if weight.dtype == torch.float64:
        raise ValueError("fastmllm::patch_embed: the Triton kernel has no fp64 path: use fp32, or run on the CPU")
    if pixels[:1].numel() >= MAX_OFFSET:
        raise ValueError(f"fastmllm::patch_embed: an image of {tuple(pixels.shape[1:])} exceeds the Triton kernel's "
                         f"{MAX_OFFSET} values")  # fmt: skip
    return images * patches, patches, width, pixels.shape[2] // patch_size


def patch_embed_triton(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, patch_size: int,
    scale: list[float], shift: list[float],
) -> Tensor:  # fmt: skip
    m, n, d, grid_w = _sizes(pixels, weight, patch_size)
    pixels, weight = pixels.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    position = None if position is None else position.contiguous()
    y = torch.empty(_output_shape(pixels, weight, patch_size), dtype=weight.dtype, device=weight.device)
    config = _config(m, d, weight.dtype)
    if m and d:
        with device_of(pixels):
            _fwd_kernel[(cdiv(m, config["BLOCK_M"]), cdiv(d, config["BLOCK_N"]))](
                pixels, weight, bias, position, y, tuple(scale), tuple(shift), m, n, d, grid_w,
                P=patch_size, C=pixels.shape[3], NORMALIZE=not _is_identity(scale, shift),
                HAS_BIAS=bias is not None, HAS_POSITION=position is not None, **config,
            )  # fmt: skip
    return y


def patch_embed_bwd_triton(
    grad: Tensor, pixels: Tensor, weight: Tensor, patch_size: int, pixel_grad: bool, weight_grad: bool,
    scale: list[float], shift: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    m, n, d, grid_w = _sizes(pixels, weight, patch_size)
    grad, pixels, weight = grad.contiguous(), pixels.contiguous(), weight.contiguous()
    k, shape = weight.shape[0], {"P": patch_size, "C": pixels.shape[3]}
    dx, dw = pixels.new_empty(0), weight.new_empty(0)
    with device_of(pixels):
        if pixel_grad:
            dx = torch.empty_like(pixels)
            config = _config(m, k, weight.dtype)
            config["BLOCK_N"] = min(config["BLOCK_N"], 64)  # leaves registers to the addresses of the scattered store
            if m and d:
                _bwd_pixels_kernel[(cdiv(m, config["BLOCK_M"]), cdiv(k, config["BLOCK_N"]))](
                    grad, weight, dx, tuple(scale), m, n, d, grid_w, **shape, **config
                )
        if weight_grad:
            config = _config(k, d, weight.dtype)
            config["BLOCK_M"], config["BLOCK_K"] = config["BLOCK_K"], config["BLOCK_M"]  # the sum runs over the rows
            tiles = cdiv(k, config["BLOCK_K"]) * cdiv(d, config["BLOCK_N"])
            parts = max(1, min(264 // max(tiles, 1), cdiv(m, 4 * config["BLOCK_M"])))
            partial = torch.empty((parts, k, d), dtype=torch.float32, device=weight.device)
            if d:
                _bwd_weight_kernel[(cdiv(k, config["BLOCK_K"]), cdiv(d, config["BLOCK_N"]), parts)](
                    grad, pixels, partial, tuple(scale), tuple(shift), m, n, d, grid_w, **shape,
                    NORMALIZE=not _is_identity(scale, shift), **config,
                )  # fmt: skip
            dw = partial.sum(0).to(weight.dtype)
    return dx, dw


# 4. operator ----------------------------------------------------------------------------------------------------------
_patch_embed = torch.library.custom_op(
    "fastmllm::patch_embed",
    patch_embed_reference,
    mutates_args=(),
    schema="(Tensor pixels, Tensor weight, Tensor? bias, Tensor? position, int patch_size, float[] scale,"
    " float[] shift) -> Tensor",
)
_patch_embed.register_kernel("cuda")(patch_embed_triton)

_patch_embed_bwd = torch.library.custom_op(
    "fastmllm::patch_embed_bwd",
    patch_embed_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor pixels, Tensor weight, int patch_size, bool pixel_grad, bool weight_grad, *,"
    " float[] scale, float[] shift) -> (Tensor, Tensor)",
)
_patch_embed_bwd.register_kernel("cuda")(patch_embed_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_patch_embed.register_fake
def _(pixels, weight, bias, position, patch_size, scale, shift):
    return weight.new_empty(_output_shape(pixels, weight, patch_size))


@_patch_embed_bwd.register_fake
def _(grad, pixels, weight, patch_size, pixel_grad, weight_grad, scale, shift):
    dx = pixels.new_empty(pixels.shape if pixel_grad else 0)
    return dx, weight.new_empty(weight.shape if weight_grad else 0)


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    pixels, weight, bias, position, ctx.patch_size, ctx.scale, ctx.shift = inputs
    ctx.save_for_backward(pixels, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.position_dtype = None if position is None else position.dtype


def _backward(ctx, grad):
    pixels, weight = ctx.saved_tensors
    need_pixels, need_weight, need_bias, need_position, *_ = ctx.needs_input_grad
    grad = grad.contiguous()
    dx = dw = db = dp = None
    if need_pixels or need_weight:
        dx, dw = _patch_embed_bwd(
            grad, pixels, weight, ctx.patch_size, need_pixels, need_weight, scale=ctx.scale, shift=ctx.shift
        )
    if need_bias or need_position:
        total = grad.sum(0, dtype=accumulator_dtype(grad.dtype))  # (N, D): plain reductions need no kernel of ours
        db = total.sum(0).to(ctx.bias_dtype) if need_bias else None
        dp = total.to(ctx.position_dtype) if need_position else None
    return dx if need_pixels else None, dw if need_weight else None, db, dp, None, None, None


_patch_embed.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def _check(pixels: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, patch_size: int) -> None:
    if pixels.dim() != 4 or weight.dim() != 2:
        raise ValueError(f"fastmllm::patch_embed: pixels must be (I, H, W, C) and weight (K, D), but they are "
                         f"{tuple(pixels.shape)} and {tuple(weight.shape)}")  # fmt: skip
    _, height, width, channels = pixels.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"fastmllm::patch_embed: pixels {tuple(pixels.shape)} are not a whole number of {patch_size} "
                         f"x {patch_size} patches: resize or pad the images to multiples of {patch_size}")  # fmt: skip
    if weight.shape[0] != patch_size * patch_size * channels:
        raise ValueError(f"fastmllm::patch_embed: weight {tuple(weight.shape)} must have {patch_size} * {patch_size} * "
                         f"{channels} rows for pixels {tuple(pixels.shape)} (I, H, W, C)")  # fmt: skip
    if not weight.is_floating_point() or not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
        raise ValueError(f"fastmllm::patch_embed: pixels must be uint8 or float and weight float, but they are "
                         f"{pixels.dtype} and {weight.dtype}")  # fmt: skip
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"fastmllm::patch_embed: bias {tuple(bias.shape)} and weight {tuple(weight.shape)} differ")
    shape = _output_shape(pixels, weight, patch_size)[1:]
    if position is not None and position.shape != shape:
        raise ValueError(f"fastmllm::patch_embed: position {tuple(position.shape)} must be {shape} for pixels "
                         f"{tuple(pixels.shape)}: interpolate it to the image's grid")  # fmt: skip


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    patch_size: int,
) -> Tensor:
    """Normalise pixels, cut them into patches, project, add bias and positions.

    Args:
        pixels: (I, H, W, C) uint8, read as v / 255, or floats in 0..1.
        weight: (K, D) projection, K = P * P * C in (row, column, channel) order.
        bias: (D,), or None.
        position: (N, D) added to every image, or None.
        mean: C numbers subtracted, in units of 0..1, or None.
        std: C numbers divided by, in units of 0..1, or None.
        patch_size: P, in pixels.

    Returns:
        (I, N, D) in the dtype of `weight`, patches in row-major order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Equal to the image processor and the patch convolution of CLIP, SigLIP and DINOv2; a convolution's weight
    (D, C, P, P) is `w.permute(2, 3, 1, 0).reshape(-1, D)` here.
    """
    _check(pixels, weight, bias, position, patch_size)
    for name, t in (("mean", mean), ("std", std)):
        if t is not None and len(t) != pixels.shape[-1]:
            raise ValueError(f"fastmllm::patch_embed: {name} has {len(t)} values for pixels {tuple(pixels.shape)}")
    unit = 1 / 255 if pixels.dtype == torch.uint8 else 1.0
    if std is not None and not all(std):
        raise ValueError(f"fastmllm::patch_embed: std {list(std)} must not be zero")
    scale = [unit / s for s in (std or [1.0] * pixels.shape[-1])]
    shift = [-m / s for m, s in zip(mean or [0.0] * len(scale), std or [1.0] * len(scale), strict=True)]
    return _patch_embed(pixels, weight, bias, position, patch_size, scale, shift)
