"""Patch embedding straight from pixels: normalise, cut, project, add bias and positions (ViT, arXiv 2010.11929).

Shapes: pixels (I, H, W, C), P patch, N = (H / P)(W / P) patches an image, D width, K = P * P * C values a patch in
(row, column, channel) order. Normalisation costs nothing: it is folded into weight and bias. The operator reads a
uint8 value v as (v - 128) / 128, which is exact in bf16 and fp16 and small, so no sum of large terms has to cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native  # noqa: F401 - registers the CPU operator
from ._triton import accumulator_dtype

CENTRE = 128  # of a uint8 value, and its scale


def _output_shape(pixels: Tensor, weight: Tensor, patch_size: int) -> tuple[int, int, int]:
    images, height, width, _ = pixels.shape
    return images, (height // patch_size) * (width // patch_size), weight.shape[1]


# 1. reference ---------------------------------------------------------------------------------------------------------
def _rows(pixels: Tensor, patch_size: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the patches (I * N, K) and the factor that they still lack."""
    images, height, width, channels = pixels.shape
    size = patch_size * patch_size * channels
    grid = (images, height // patch_size, patch_size, width // patch_size, patch_size * channels)
    if pixels.dtype == torch.uint8:
        pixels = (pixels ^ CENTRE).view(torch.int8)  # v - 128 in two's complement
    rows = pixels.reshape(grid).transpose(2, 3).to(dtype).reshape(pixels.numel() // size, size)
    return rows, 1 / CENTRE if pixels.dtype == torch.int8 else 1.0


def patch_embed_reference(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, patch_size: int
) -> Tensor:
    rows, scale = _rows(pixels, patch_size, weight.dtype)
    shape = _output_shape(pixels, weight, patch_size)
    acc = accumulator_dtype(weight.dtype)
    added = [t.to(acc) for t in (position, bias) if t is not None]
    if not added:
        return torch.mm(rows, weight).mul_(scale).view(shape)
    offset = (added[0] + added[1] if len(added) == 2 else added[0]).to(weight.dtype)  # (N, D) or (D,)
    return torch.addmm(offset.expand(shape).flatten(0, 1), rows, weight, alpha=scale).view(shape)


def patch_embed_bwd_reference(
    grad: Tensor, pixels: Tensor, weight: Tensor, patch_size: int, pixel_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    grad = grad.reshape(-1, weight.shape[1])  # (I * N, D)
    dx, dw = pixels.new_empty(0), weight.new_empty(0)
    if pixel_grad:
        images, height, width, channels = pixels.shape
        grid = (images, height // patch_size, width // patch_size, patch_size, patch_size * channels)
        dx = torch.mm(grad, weight.t()).view(grid).transpose(2, 3).to(pixels.dtype).reshape(pixels.shape)
    if weight_grad:
        rows, scale = _rows(pixels, patch_size, weight.dtype)
        dw = torch.mm(rows.t(), grad).mul_(scale)
    return dx, dw


# 4. operator ----------------------------------------------------------------------------------------------------------
_patch_embed = torch.library.custom_op(
    "fastmllm::patch_embed",
    patch_embed_reference,
    mutates_args=(),
    schema="(Tensor pixels, Tensor weight, Tensor? bias, Tensor? position, int patch_size) -> Tensor",
)

_patch_embed_bwd = torch.library.custom_op(
    "fastmllm::patch_embed_bwd",
    patch_embed_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor pixels, Tensor weight, int patch_size, bool pixel_grad, bool weight_grad)"
    " -> (Tensor, Tensor)",
)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_patch_embed.register_fake
def _(pixels, weight, bias, position, patch_size):
    return weight.new_empty(_output_shape(pixels, weight, patch_size))


@_patch_embed_bwd.register_fake
def _(grad, pixels, weight, patch_size, pixel_grad, weight_grad):
    dx = pixels.new_empty(pixels.shape if pixel_grad else 0)
    return dx, weight.new_empty(weight.shape if weight_grad else 0)


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    pixels, weight, bias, position, ctx.patch_size = inputs
    ctx.save_for_backward(pixels, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.position_dtype = None if position is None else position.dtype


def _backward(ctx, grad):
    pixels, weight = ctx.saved_tensors
    need_pixels, need_weight, need_bias, need_position, _ = ctx.needs_input_grad
    grad = grad.contiguous()
    dx = dw = db = dp = None
    if need_pixels or need_weight:
        dx, dw = _patch_embed_bwd(grad, pixels, weight, ctx.patch_size, need_pixels, need_weight)
    if need_bias or need_position:
        total = grad.sum(0, dtype=accumulator_dtype(grad.dtype))  # (N, D): plain reductions need no kernel of ours
        db = total.sum(0).to(ctx.bias_dtype) if need_bias else None
        dp = total.to(ctx.position_dtype) if need_position else None
    return dx if need_pixels else None, dw if need_weight else None, db, dp, None


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


def fold_normalization(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | Sequence[float] | None,
    std: Tensor | Sequence[float] | None,
    *,
    uint8: bool,
    channels: int = 3,
) -> tuple[Tensor, Tensor | None]:
    """Fold the normalisation of pixels into the projection, for `patch_embed_folded`; differentiable.

    Args:
        weight: (K, D) projection of normalised patches.
        bias: (D,) or None.
        mean: (C,) in units of 0..1, or None for 0.
        std: (C,) in units of 0..1, or None for 1.
        uint8: whether the pixels are uint8 (0..255 stands for 0..1) or floats.
        channels: C.

    Returns:
        The weight (K, D) in its own dtype, and the bias (D,) in fp32 (fp64 for fp64 weights) or None.
    """
    acc = accumulator_dtype(weight.dtype)
    one = weight.new_ones(channels, dtype=acc)
    scale = one if std is None else 1 / torch.as_tensor(std, dtype=acc, device=weight.device)
    shift = 0 * one if mean is None else -torch.as_tensor(mean, dtype=acc, device=weight.device)
    if uint8:  # (v / 255 - mean) / std = (u + (128 - 255 mean) / 128) * 128 / (255 std), u = (v - 128) / 128
        scale, shift = scale * (CENTRE / 255), shift * (255 / CENTRE) + 1
    elif mean is None and std is None:
        return weight, bias
    repeat = weight.shape[0] // channels
    folded = (weight.to(acc) * scale.repeat(repeat)[:, None]).to(weight.dtype)
    # from the rounded weight, so that its rounding error is multiplied by x - mean and not by x
    offset = torch.mv(folded.to(acc).t(), shift.repeat(repeat))
    return folded, offset if bias is None else offset + bias.to(acc)


def patch_embed_folded(
    pixels: Tensor, weight: Tensor, bias: Tensor | None = None, position: Tensor | None = None, *, patch_size: int
) -> Tensor:
    """Embed patches with the weight and bias that `fold_normalization` returned (frozen weights are folded once).

    Args:
        pixels: (I, H, W, C) uint8, or floats.
        weight: (K, D) folded projection, K = P * P * C in (row, column, channel) order.
        bias: (D,) folded bias, or None.
        position: (N, D), or None.
        patch_size: P, in pixels.

    Returns:
        (I, N, D) in the dtype of `weight`, patches in row-major order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check(pixels, weight, bias, position, patch_size)
    return _patch_embed(pixels, weight, bias, position, patch_size)


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    *,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    patch_size: int,
) -> Tensor:
    """Normalise pixels, cut them into patches, project, add bias and positions.

    Args:
        pixels: (I, H, W, C) uint8, read as v / 255, or floats in 0..1.
        weight: (K, D) projection, K = P * P * C in (row, column, channel) order.
        bias: (D,), or None.
        position: (N, D) added to every image, or None.
        mean: (C,) subtracted, in units of 0..1, or None.
        std: (C,) divided by, in units of 0..1, or None.
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
    uint8 = pixels.dtype == torch.uint8
    weight, bias = fold_normalization(weight, bias, mean, std, uint8=uint8, channels=pixels.shape[-1])
    return _patch_embed(pixels, weight, bias, position, patch_size)
