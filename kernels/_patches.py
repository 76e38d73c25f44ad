"""Cutting patches: in plain torch for the references, and in kernels. For the letters see patch_embed.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._grids import find_segment, patch_place
from ._triton import accumulator_dtype, tl, triton


def error(message: str) -> ValueError:
    return ValueError(f"fastmllm::patch_embed: {message}")


def is_identity(scale: list[float], shift: list[float]) -> bool:
    return all(s == 1 for s in scale) and not any(shift)


def count_patches(pixels: Tensor, weight: Tensor, grids: Tensor | None) -> tuple[int, int]:
    """Return the segments and all their patches; a dense batch has one segment an image."""
    if grids is not None:
        return grids.shape[1] - 1, pixels.numel() // weight.shape[0]
    images, *shape = pixels.shape
    return images, images * (shape[0] * shape[1] * shape[2] // weight.shape[0])


def output_shape(pixels: Tensor, weight: Tensor, prefix_rows: int, grids: Tensor | None) -> list[int]:
    count, m = count_patches(pixels, weight, grids)
    if grids is not None:
        return [m + count * prefix_rows, weight.shape[1]]
    values = pixels.shape[1] * pixels.shape[2] * pixels.shape[3]
    return [count, values // weight.shape[0] + prefix_rows, weight.shape[1]]


def images(pixels: Tensor, grids: Tensor | None, patch: int, frames: int, planar: bool, size: int) -> Iterator[Tensor]:
    """Yield (B, T, H, W, C) views: the dense batch, or one segment after the other."""
    if grids is None:
        yield (pixels.movedim(1, -1) if planar else pixels).unsqueeze(1)
        return
    starts, heights, widths, _ = grids.tolist()
    channels = size // (frames * patch * patch)
    for start, h, w in zip(starts, heights[:-1], widths, strict=False):
        image = pixels[start * size : (start + h * w) * size]
        if planar:
            yield image.view(1, frames, channels, h * patch, w * patch).movedim(2, -1)
        else:
            yield image.view(1, frames, h * patch, w * patch, channels)


def cut_patches(image: Tensor, patch: int, merge: int) -> Tensor:
    """View (B, T, H, W, C) as (B, block row, block column, row, column, T, P, P, C)."""
    _, _, height, width, _ = image.shape
    h, w = height // patch // merge, width // patch // merge
    return image.unflatten(3, (w, merge, patch)).unflatten(2, (h, merge, patch)).permute(0, 2, 5, 3, 6, 1, 4, 7, 8)


def token_rows(grids: Tensor, m: int, prefix_rows: int) -> Tensor:
    """Return where the patches lie among the packed tokens, (M,) int64."""
    rows = torch.arange(m, device=grids.device)
    return rows + prefix_rows * torch.searchsorted(grids[0, 1:].contiguous(), rows, right=True) + prefix_rows


def prefix_places(grids: Tensor, prefix_rows: int) -> Tensor:
    """Return where the prefixes lie among the packed tokens, (S, R) int64."""
    return grids[3, :-1].long()[:, None] + torch.arange(prefix_rows, device=grids.device)


def patch_rows(
    pixels: Tensor, grids: Tensor | None, patch: int, frames: int, merge: int, planar: bool, scale: list[float],
    shift: list[float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the normalised patches (M, K)."""
    size, acc = frames * patch * patch * len(scale), accumulator_dtype(dtype)
    affine = pixels.dtype == torch.uint8 or not is_identity(scale, shift)
    scales, shifts = (torch.tensor(t, dtype=acc, device=pixels.device) for t in (scale, shift))
    parts = []
    for image in images(pixels, grids, patch, frames, planar, size):
        normed = torch.addcmul(shifts, image.to(acc), scales) if affine else image
        parts.append(cut_patches(normed, patch, merge).to(dtype).reshape(image.numel() // size, size))
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else pixels.new_empty((0, size), dtype=dtype)


def project(rows: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None) -> Tensor:
    """Return rows (M, K) times weight, plus bias (D,) and position (M, D), which are summed first."""
    acc = accumulator_dtype(weight.dtype)
    added = [t.to(acc) for t in (position, bias) if t is not None]
    if not added:
        return torch.mm(rows, weight)
    offset = added[0] + added[1] if len(added) == 2 else added[0]
    return torch.addmm(offset.to(weight.dtype), rows, weight)


def assemble(tokens: Tensor, prefix: Tensor | None, grids: Tensor | None, count: int) -> Tensor:
    """Put the prefix in front of the tokens (M, D) of each of `count` images, or of each segment."""
    if prefix is None:
        return tokens
    prefix, width = prefix.to(tokens.dtype), tokens.shape[-1]
    if grids is None:
        n = tokens.shape[0] // max(count, 1)
        return torch.cat([prefix.expand(count, -1, -1), tokens.view(count, n, width)], 1)
    m, r = tokens.shape[0], prefix.shape[0]
    out = tokens.new_empty(m + (grids.shape[1] - 1) * r, width)
    out[prefix_places(grids, r)] = prefix
    out[token_rows(grids, m, r)] = tokens
    return out


def without_prefix(grad: Tensor, pixels: Tensor, weight: Tensor, grids: Tensor | None, prefix_rows: int) -> Tensor:
    """Return the gradient of the patches, (M, D)."""
    _, m = count_patches(pixels, weight, grids)
    if grids is None:
        return grad[:, prefix_rows:].reshape(m, grad.shape[-1])
    return grad[token_rows(grids, m, prefix_rows)] if prefix_rows else grad


def flatten_images(
    images: Sequence[Tensor], patch_size: int, temporal_patch_size: int = 1, layout: str = "hwc",
    device: torch.device | None = None,
) -> tuple[Tensor, list[tuple[int, int, int]]]:  # fmt: skip
    """Concatenate images (H, W, C) and videos (F, H, W, C), channels first in layout "chw"; return their grids too.

    `device` is where no images lie: an empty list is uint8 there.
    """
    t, p, chw = temporal_patch_size, patch_size, layout == "chw"
    grids: list[tuple[int, int, int]] = []
    if not images:
        return torch.empty(0, dtype=torch.uint8, device=device), grids
    for x in images:
        frames, *shape = x.shape if x.dim() == 4 else (t, *x.shape)
        h, w = (shape[1:] if chw else shape[:2]) if len(shape) == 3 else (-1, -1)
        if h < 0 or h % p or w % p or frames % t or (x.dim() != 4 and t > 1):
            raise error(f"an image {tuple(x.shape)} must be {'(C, H, W)' if chw else '(H, W, C)'} of whole {p} x {p} "
                         f"patches, a video in front of that a multiple of {t} frames; for a still, fold the "
                         "weight")  # fmt: skip
        grids.append((frames // t, h // p, w // p))
    return torch.cat([x.reshape(-1) for x in images]), grids


# A patch is T * P runs of P * C consecutive values (planar: C * P runs of P). P and C are constants, so the compiler
# proves how far a run is aligned and loads whole words: 16 bytes of uint8 for P = 16, pairs for P = 14 (runs of 42
# bytes start at even bytes). k counts a patch's values as they lie in memory. BITS > 0: packed, 2**BITS > S segments.
@triton.jit
def locate(
    rows, grids_ptr, S, N, GRID_W, R: tl.constexpr, P: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    MERGE: tl.constexpr, PLANAR: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Return where patch `rows` starts, the values of an image row and of a plane, and the patch's row of y."""
    run: tl.constexpr = P if PLANAR else P * C
    place = rows.to(tl.int32)  # 64-bit divisions are slow, and take many registers
    if BITS > 0:
        segment = find_segment(place, grids_ptr, S, BITS)
        first = tl.load(grids_ptr + segment)
        height = tl.load(grids_ptr + (S + 1) + segment)
        width = tl.maximum(tl.load(grids_ptr + 2 * (S + 1) + segment), 1)
        area = height * width
    else:
        segment = place // N
        first, width, area = segment * N, GRID_W, N
    line, column = patch_place(place - first, width, MERGE)
    pitch = width * run
    base = first.to(tl.int64) * (T * P * P * C) + (line * P * pitch + column * run)
    return base, pitch, area * (P * P), rows + (segment + 1) * R if R else rows


@triton.jit
def value(k, pitch, plane, P: tl.constexpr, C: tl.constexpr, T: tl.constexpr, PLANAR: tl.constexpr):
    """Return where value `k` of a patch lies, from the start of the patch."""
    if PLANAR:
        offset = k // P % P * pitch + k // (P * P) % C * plane + k % P
    else:
        offset = k // (P * C) % P * pitch + k % (P * C)
    if T > 1:
        offset += k // (P * P * C) * (plane * C)
    return offset


@triton.jit
def weight_row(k, P: tl.constexpr, C: tl.constexpr, PLANAR: tl.constexpr):
    """Return the row of the weight that value `k` of a patch meets."""
    if PLANAR:
        return (k // (P * P * C) * (P * P) + k % (P * P)) * C + k // (P * P) % C
    return k


@triton.jit
def per_channel(values, k, P: tl.constexpr, C: tl.constexpr, PLANAR: tl.constexpr):
    """Return the values of each k's channel; they are kernel arguments, so nothing is copied to the device."""
    channel = k // (P * P) % C if PLANAR else k % C
    out = tl.zeros(k.shape, tl.float32)
    for c in tl.static_range(C):
        out = tl.where(channel == c, values[c], out)
    return out
