"""Resample a learned position table to the grid of every packed image, with gradient to the table.

Shapes: table (G, Q, D), a grid of G x Q positions; S segments of h x w patches, M patches in all. An output row is the
weighted sum of 2 x 2 or 4 x 4 table entries (more where antialiasing shrinks the table); both axes have their own
weights, as in torch.nn.functional.interpolate. The backward walks, for each table entry, the patches that read it: no
atomics, the same result each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._grids import find_segment, grid_table, patch_place, segments
from ._triton import accumulator_dtype, cdiv, device_of, next_power_of_2, tl, triton

MODES = {"bilinear": 0, "bicubic": 1, "antialias": 2}
REACH = {"bilinear": 1, "bicubic": 2, "antialias": 1}  # table entries to either side; antialiasing scales it


# 1. reference ---------------------------------------------------------------------------------------------------------
def _by_size(grids: Tensor) -> dict[tuple[int, int], list[int]]:
    """Return the first patches of the segments of each size."""
    starts, heights, widths, _ = grids.tolist()
    found: dict[tuple[int, int], list[int]] = {}
    for start, h, w in zip(starts, heights[:-1], widths, strict=False):
        if h * w:
            found.setdefault((h, w), []).append(start)
    return found


def _blocks(rows: int, columns: int, merge: int, like: Tensor) -> Tensor:
    """Return the row-major place of each patch in the order of merge blocks."""
    place = torch.arange(rows * columns, device=like.device).view(rows // merge, merge, columns // merge, merge)
    return place.transpose(1, 2).flatten()


def _matrix(out: int, size: int, mode: str, align_corners: bool, like: Tensor) -> Tensor:
    """Return with which weight each of `out` places reads each of `size` entries of one axis: (out, size)."""
    unit = torch.eye(size, dtype=accumulator_dtype(like.dtype), device=like.device)[None, None]
    mode, antialias = ("bilinear", True) if mode == "antialias" else (mode, False)
    return torch.nn.functional.interpolate(
        unit, (out, size), mode=mode, align_corners=align_corners, antialias=antialias
    )[0, 0]


def position_resample_reference(
    table: Tensor, grids: Tensor, rows: int, merge_size: int, taps: int, mode: str, align_corners: bool
) -> Tensor:
    out = table.new_empty(rows, table.shape[-1])
    height, width, d = table.shape
    wide = table.to(accumulator_dtype(table.dtype)).reshape(height, width * d)
    for (h, w), starts in _by_size(grids).items():
        down, across = (_matrix(*axis, mode, align_corners, table) for axis in ((h, height), (w, width)))
        y = (across @ (down @ wide).view(h, width, d)).to(table.dtype).view(h * w, d)
        y = y if merge_size == 1 else y[_blocks(h, w, merge_size, y)]
        for start in starts:
            out[start : start + h * w] = y
    return out


def position_resample_bwd_reference(
    grad: Tensor, grids: Tensor, height: int, width: int, merge_size: int, taps: int, mode: str, align_corners: bool
) -> Tensor:
    d = grad.shape[-1]
    total = grad.new_zeros((height, width * d), dtype=accumulator_dtype(grad.dtype))
    for (h, w), starts in _by_size(grids).items():
        parts = torch.stack([grad[start : start + h * w] for start in starts]).sum(0, dtype=total.dtype)
        if merge_size > 1:
            parts = torch.empty_like(parts).index_copy_(0, _blocks(h, w, merge_size, parts), parts)
        down, across = (_matrix(*axis, mode, align_corners, grad) for axis in ((h, height), (w, width)))
        total.addmm_(down.t(), (across.t() @ parts.view(h, w, d)).view(h, width * d))
    return total.view(height, width, d).to(grad.dtype)


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _source(place, out, size, ALIGN: tl.constexpr):
    """Return the table entry before `place` of `out` places, and how far behind it lies, exactly (whole numbers)."""
    if ALIGN:
        whole = tl.maximum(out - 1, 1)
        number = place * (size - 1)
    else:
        whole = 2 * out
        number = (2 * place + 1) * size + out  # one entry further on, so that nothing is negative
    entry = number // whole
    fraction = (number - entry * whole).to(tl.float32) / whole
    return (entry if ALIGN else entry - 1), fraction


@triton.jit
def _tap(fraction, TAP: tl.constexpr, MODE: tl.constexpr):
    """Return the weight of the entry that is TAP behind the first one in reach (Keys' cubic with a = -0.75)."""
    if MODE == 0:
        return fraction if TAP == 1 else 1.0 - fraction
    x = tl.abs(fraction - (TAP - 1))
    if TAP == 1 or TAP == 2:
        return (1.25 * x - 2.25) * x * x + 1.0
    return ((-0.75 * x + 3.75) * x - 6.0) * x + 3.0


@triton.jit
def _triangle(entry, place, out, size):
    """Return the unscaled weight of a table entry, antialiased: a triangle as wide as the place it fills."""
    centre = ((2 * place + 1) * size).to(tl.float32) / (2 * out)
    reach = tl.maximum(size.to(tl.float32) / out, 1.0)
    inside = (entry >= 0) & (entry < size)
    return tl.where(inside, tl.maximum(1.0 - tl.abs(entry + 0.5 - centre) / reach, 0.0), 0.0)


@triton.jit
def _first_entry(place, out, size):
    """Return the first entry of a triangle's reach, perhaps one too early."""
    return (tl.maximum((2 * place + 1) * size - 2 * tl.maximum(size, out), 0)) // (2 * out)


@triton.jit
def _triangle_sum(place, out, size, TAPS: tl.constexpr):
    first = _first_entry(place, out, size)
    total = tl.zeros(place.shape, tl.float32)
    for tap in tl.static_range(TAPS):
        total += _triangle(first + tap, place, out, size)
    return tl.maximum(total, 1e-6)  # behind the last place there may be nothing


@triton.jit
def _weight(entry, place, out, size, TAPS: tl.constexpr, MODE: tl.constexpr, ALIGN: tl.constexpr):
    """Return with which weight `place` reads `entry`; what lies outside of the table is read at its border."""
    if MODE == 2:
        return _triangle(entry, place, out, size) / _triangle_sum(place, out, size, TAPS)
    before, fraction = _source(place, out, size, ALIGN)
    weight = tl.zeros(place.shape, tl.float32)
    for tap in tl.static_range(TAPS):
        read = tl.minimum(tl.maximum(before + tap - (TAPS // 2 - 1), 0), size - 1)
        weight += tl.where(read == entry, _tap(fraction, tap, MODE), 0.0)
    return weight


@triton.jit
def _fwd_kernel(
    table_ptr, grids_ptr, y_ptr, M, G, Q, D, S,
    TAPS: tl.constexpr, MODE: tl.constexpr, ALIGN: tl.constexpr, MERGE: tl.constexpr, BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    segment = find_segment(rows, grids_ptr, S, BITS)
    h = tl.maximum(tl.load(grids_ptr + (S + 1) + segment), 1)  # rows behind the end may find an empty segment
    w = tl.maximum(tl.load(grids_ptr + 2 * (S + 1) + segment), 1)
    line, column = patch_place((rows - tl.load(grids_ptr + segment)).to(tl.int32), w, MERGE)
    mask = (rows < M)[:, None] & (cols < D)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if MODE == 2:
        over = tl.zeros((BLOCK_M,), tl.int32) + G  # as tensors: the interpreter has plain integers here
        across = tl.zeros((BLOCK_M,), tl.int32) + Q
        top, left = _first_entry(line, h, over), _first_entry(column, w, across)
        total = _triangle_sum(line, h, over, TAPS) * _triangle_sum(column, w, across, TAPS)
        for tap in range(TAPS * TAPS):
            i, j = top + tap // TAPS, left + tap % TAPS
            weight = _triangle(i, line, h, over) * _triangle(j, column, w, across)
            read = tl.minimum(i, G - 1) * Q + tl.minimum(j, Q - 1)
            value = tl.load(table_ptr + read.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0.0)
            acc += (weight / total)[:, None] * value.to(tl.float32)
    else:
        top, down = _source(line, h, G, ALIGN)
        left, right = _source(column, w, Q, ALIGN)
        for i in tl.static_range(TAPS):
            entry = tl.minimum(tl.maximum(top + i - (TAPS // 2 - 1), 0), G - 1)
            for j in tl.static_range(TAPS):
                read = entry * Q + tl.minimum(tl.maximum(left + j - (TAPS // 2 - 1), 0), Q - 1)
                value = tl.load(table_ptr + read.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0.0)
                acc += (_tap(down, i, MODE) * _tap(right, j, MODE))[:, None] * value.to(tl.float32)
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _readers(entry, out, size, reach, ALIGN: tl.constexpr):
    """Return a range of places that holds all that read `entry`."""
    if ALIGN:
        whole = tl.maximum(size - 1, 1)
        first = tl.maximum(entry - reach, 0) * (out - 1) // whole
        last = (entry + reach) * (out - 1) // whole
    else:
        first = tl.maximum(2 * (entry - reach) + 1, 0) * out // (2 * size)
        last = (2 * (entry + reach) + 1) * out // (2 * size)
    return tl.maximum(first - 1, 0), tl.minimum(last + 2, out)


@triton.jit
def _bwd_kernel(
    dy_ptr, grids_ptr, dtable_ptr, G, Q, D, S, REACH: tl.constexpr,
    TAPS: tl.constexpr, MODE: tl.constexpr, ALIGN: tl.constexpr, MERGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program sums up one table entry: over the segments, and in each over the patches that read it."""
    i, j = tl.program_id(0) // Q, tl.program_id(0) % Q
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for segment in range(S):
        start = tl.load(grids_ptr + segment).to(tl.int64)
        h = tl.load(grids_ptr + (S + 1) + segment)
        w = tl.load(grids_ptr + 2 * (S + 1) + segment)
        rise, run = REACH, REACH
        if MODE == 2:
            rise = (G + h - 1) // tl.maximum(h, 1)
            run = (Q + w - 1) // tl.maximum(w, 1)
        top, bottom = _readers(i, h, G, rise, ALIGN)
        left, right = _readers(j, w, Q, run, ALIGN)
        across = tl.maximum(right - left, 1)
        count = (bottom - top) * (right - left)
        for first in range(0, count, BLOCK_M):
            n = first + tl.arange(0, BLOCK_M)
            line, column = top + n // across, left + n % across
            over = tl.zeros((BLOCK_M,), tl.int32) + G
            wide = tl.zeros((BLOCK_M,), tl.int32) + Q
            weight = _weight(i, line, h, over, TAPS, MODE, ALIGN) * _weight(j, column, w, wide, TAPS, MODE, ALIGN)
            block = line // MERGE * (w // MERGE) + column // MERGE
            patch = (block * MERGE + line % MERGE) * MERGE + column % MERGE
            mask = (n < count)[:, None] & (cols < D)[None, :]
            dy = tl.load(dy_ptr + (start + patch)[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            acc += tl.sum(tl.where(n < count, weight, 0.0)[:, None] * dy, 0)
    offsets = tl.program_id(0).to(tl.int64) * D + cols
    tl.store(dtable_ptr + offsets, acc.to(dtable_ptr.dtype.element_ty), mask=cols < D)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(d: int, dtype: torch.dtype) -> dict[str, int]:
    block_n = max(16, min(256, next_power_of_2(d)))
    return {"BLOCK_M": max(1, min(16, 8192 // (block_n * dtype.itemsize))), "BLOCK_N": block_n, "num_warps": 4}


def position_resample_triton(
    table: Tensor, grids: Tensor, rows: int, merge_size: int, taps: int, mode: str, align_corners: bool
) -> Tensor:
    if table.dtype == torch.float64:
        return position_resample_reference(table, grids, rows, merge_size, taps, mode, align_corners)
    table, (g, q, d) = table.contiguous(), table.shape
    y = torch.empty((rows, d), dtype=table.dtype, device=table.device)
    s, config = grids.shape[1] - 1, _config(d, table.dtype)
    if rows and d:
        with device_of(table):
            _fwd_kernel[(cdiv(rows, config["BLOCK_M"]), cdiv(d, config["BLOCK_N"]))](
                table, grids, y, rows, g, q, d, s, TAPS=taps, MODE=MODES[mode], ALIGN=align_corners, MERGE=merge_size,
                BITS=s.bit_length(), **config,
            )  # fmt: skip
    return y


def position_resample_bwd_triton(
    grad: Tensor, grids: Tensor, height: int, width: int, merge_size: int, taps: int, mode: str, align_corners: bool
) -> Tensor:
    if grad.dtype == torch.float64:
        return position_resample_bwd_reference(grad, grids, height, width, merge_size, taps, mode, align_corners)
    grad, d = grad.contiguous(), grad.shape[-1]
    dtable = torch.empty((height, width, d), dtype=grad.dtype, device=grad.device)
    config = _config(d, grad.dtype)
    if d:
        with device_of(grad):
            _bwd_kernel[(height * width, cdiv(d, config["BLOCK_N"]))](
                grad, grids, dtable, height, width, d, grids.shape[1] - 1, REACH=REACH[mode], TAPS=taps,
                MODE=MODES[mode], ALIGN=align_corners, MERGE=merge_size, **config,
            )  # fmt: skip
    return dtable


# 4. operator ----------------------------------------------------------------------------------------------------------
_position_resample = torch.library.custom_op(
    "fastmllm::position_resample",
    position_resample_reference,
    mutates_args=(),
    schema="(Tensor table, Tensor grids, SymInt rows, int merge_size, int taps, str mode, bool align_corners)"
    " -> Tensor",
)
_position_resample.register_kernel("cuda")(position_resample_triton)

_position_resample_bwd = torch.library.custom_op(
    "fastmllm::position_resample_bwd",
    position_resample_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor grids, SymInt height, SymInt width, int merge_size, int taps, str mode,"
    " bool align_corners) -> Tensor",
)
_position_resample_bwd.register_kernel("cuda")(position_resample_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_position_resample.register_fake
def _(table, grids, rows, merge_size, taps, mode, align_corners):
    return table.new_empty(rows, table.shape[-1])


@_position_resample_bwd.register_fake
def _(grad, grids, height, width, merge_size, taps, mode, align_corners):
    return grad.new_empty(height, width, grad.shape[-1])


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    table, grids, _, *ctx.rest = inputs
    ctx.save_for_backward(grids)
    ctx.height, ctx.width = table.shape[:2]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad):
    if grad is None:
        return (None,) * 7
    (grids,) = ctx.saved_tensors
    return _position_resample_bwd(grad.contiguous(), grids, ctx.height, ctx.width, *ctx.rest), *(None,) * 6


_position_resample.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def position_resample(
    table: Tensor,
    grid_thw: Sequence[Sequence[int]] | Tensor,
    *,
    mode: str = "bicubic",
    align_corners: bool = False,
    antialias: bool = False,
    merge_size: int = 1,
) -> Tensor:
    """Resample a position table to the grids of images, every frame for itself.

    Args:
        table: (G, Q, D) positions of a G x Q grid, without the class token's.
        grid_thw: (t, h, w) or (h, w) patches of each image, on the host.
        mode: "bilinear" or "bicubic" (a = -0.75).
        align_corners: the corners of table and grid coincide (Qwen3-VL).
        antialias: widen the weights where the table shrinks (SigLIP2-NaFlex); bilinear, corners not aligned.
        merge_size: patches come in blocks of merge_size x merge_size, as Qwen-VL's merger takes them; 1 is row-major.

    Returns:
        (M, D) in the dtype of `table`, M the patches of all grids: `position` of `patch_embed_packed`, or of
        `patch_embed` for one grid.

    Raises:
        ValueError: shapes or dtypes do not fit, or the mode is unknown.

    Equal to torch.nn.functional.interpolate in fp32: bicubic is DINOv2's, bilinear with align_corners Qwen3-VL's
    fast_pos_embed_interpolate, bilinear with antialias SigLIP2-NaFlex's.
    """
    if table.dim() != 3 or not table.is_floating_point() or not table.shape[0] or not table.shape[1]:
        raise ValueError(f"fastmllm::position_resample: table must be (G, Q, D) floats, but it is {tuple(table.shape)} "
                         f"{table.dtype}: view a flat one as a grid, without the class token's row")  # fmt: skip
    if mode not in ("bilinear", "bicubic") or (antialias and (mode != "bilinear" or align_corners)):
        raise ValueError(f"fastmllm::position_resample: {mode=}, {align_corners=}, {antialias=}: mode is 'bilinear' or "
                         "'bicubic', and antialias needs bilinear and corners that are not aligned")  # fmt: skip
    sizes = segments("position_resample", grid_thw)
    if merge_size < 1 or any(h % merge_size or w % merge_size for h, w in sizes):
        raise ValueError(f"fastmllm::position_resample: grids {sizes[:8]} must be multiples of {merge_size=}")
    taps = 4 if mode == "bicubic" else 2
    if antialias:  # of a triangle two entries wide to either side, and one for where it begins
        shrink = max([cdiv(t, n) for size in sizes for t, n in zip(table.shape, size, strict=False) if n], default=1)
        taps = 2 * shrink + 1
    rows = sum(h * w for h, w in sizes)
    grids = grid_table(sizes, 0, table.device)
    return _position_resample(table, grids, rows, merge_size, taps, "antialias" if antialias else mode, align_corners)
