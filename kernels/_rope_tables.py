"""Cosine and sine tables of visual positions: 2-D grids of patches, and M-RoPE of mixed text and images.

Shapes: T packed tokens, R rotary dimension (the head dimension, or less), so that a table is (T, R/2), fp32. Made once
a batch and shared by all layers. Sizes come from host lists: nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._runs import upload


def grid_positions(
    grid_thw: Sequence[Sequence[int]], merge_size: int = 1, device: torch.device | str | None = None
) -> Tensor:
    """List the row and the column of every patch of packed images and videos.

    Args:
        grid_thw: host list, (frames, rows, columns) in patches for each image or video.
        merge_size: side of the squares of patches that a merger joins later; their patches stand together. 1 = rows
            one after another.
        device: where to put the positions; one copy of the list goes there, nothing comes back.

    Returns:
        (T, 2) int64, T = sum of t * h * w.

    Raises:
        ValueError: a grid is not three positive numbers, or is not divisible by `merge_size`.

    Equal to the position ids of Qwen2-VL, Qwen2.5-VL and Qwen3-VL (merge_size 2), and Pixtral (merge_size 1).
    """
    grids = [tuple(int(n) for n in grid) for grid in grid_thw]
    for index, grid in enumerate(grids):
        if len(grid) != 3 or min(grid) < 1 or merge_size < 1 or grid[1] % merge_size or grid[2] % merge_size:
            raise ValueError(f"fastmllm::grid_positions: grid {index} {grid} must be (t, h, w), positive, h and w "
                             f"divisible by merge_size {merge_size}")  # fmt: skip
    # a video's frames are so many images of its size
    sizes, total = [], 0
    for t, h, w in grids:
        sizes += [t * h * w, h * w, w // merge_size, total]
        total += t * h * w
    table = upload(tuple(sizes), torch.get_default_device() if device is None else torch.device(device)).view(-1, 4)
    _, area, squares, start = table.repeat_interleave(table[:, 0], dim=0, output_size=total).unbind(1)
    place = (torch.arange(total, device=table.device) - start) % area  # in its frame
    square, inside = place // merge_size**2, place % merge_size**2
    row = square // squares * merge_size + inside // merge_size
    column = square % squares * merge_size + inside % merge_size
    return torch.stack([row, column], 1)


def axial_rope_tables(
    position_ids: Tensor, rotary_dim: int, theta: float = 10000.0, staggered: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the tables of 2-D positions: half of the frequencies turn by the row, half by the column.

    Args:
        position_ids: (T, 2) rows and columns, integer or float; a token without a place (CLS) has (0, 0).
        rotary_dim: R, divisible by 4.
        theta: base of the frequencies.
        staggered: rows take the even and columns the odd ones of the R/2 frequencies (Pixtral); otherwise both take
            the same R/4 (Qwen-VL, and Llama-4 whose positions are (column + 1, row + 1)).

    Returns:
        cos and sin, (T, R/2) fp32.

    Raises:
        ValueError: shapes do not fit.

    Equal to the vision rotary embeddings of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Pixtral and Llama-4.
    """
    if position_ids.dim() != 2 or position_ids.shape[1] != 2 or rotary_dim < 4 or rotary_dim % 4:
        raise ValueError(f"fastmllm::axial_rope_tables: position_ids {tuple(position_ids.shape)} must be (T, 2) and "
                         f"rotary_dim {rotary_dim} divisible by 4")  # fmt: skip
    frequencies = _frequencies(rotary_dim, theta, position_ids.device)
    rows, columns = frequencies[::2], frequencies[1::2] if staggered else frequencies[::2]
    places = position_ids.float()
    angles = torch.cat([places[:, :1] * rows, places[:, 1:] * columns], 1)
    return angles.cos(), angles.sin()


def mrope_tables(
    position_ids: Tensor,
    rotary_dim: int,
    mrope_section: Sequence[int],
    theta: float = 10000.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the tables of M-RoPE: every frequency turns by the time, the row or the column of its token.

    Args:
        position_ids: (3, T) time, row and column; text has the same number in all three.
        rotary_dim: R, even.
        mrope_section: host list, how many of the R/2 frequencies follow time, row and column.
        theta: base of the frequencies.
        interleaved: the three take turns, t h w t h w ... and time has the rest (Qwen3-VL); otherwise they stand one
            after another (Qwen2-VL, Qwen2.5-VL).

    Returns:
        cos and sin, (T, R/2) fp32.

    Raises:
        ValueError: shapes do not fit, or the sections do not sum to R/2.

    Equal to the text rotary embeddings of Qwen2-VL, Qwen2.5-VL and Qwen3-VL (Qwen2-VL, arXiv 2409.12191).
    """
    if position_ids.dim() != 2 or position_ids.shape[0] != 3:
        raise ValueError(f"fastmllm::mrope_tables: position_ids {tuple(position_ids.shape)} must be (3, T)")
    section = [int(n) for n in mrope_section]
    if rotary_dim % 2 or len(section) != 3 or min(section) < 0 or 2 * sum(section) != rotary_dim:
        raise ValueError(f"fastmllm::mrope_tables: mrope_section {section} must be three numbers with the sum "
                         f"rotary_dim / 2, rotary_dim is {rotary_dim}")  # fmt: skip
    index = torch.arange(rotary_dim // 2, device=position_ids.device)
    if interleaved:
        turn = index % 3
        rows, columns = (turn == 1) & (index < 3 * section[1]), (turn == 2) & (index < 3 * section[2])
        axis = rows + 2 * columns
    else:
        axis = (index >= section[0]).long() + (index >= section[0] + section[1])
    places = position_ids.float().t().index_select(1, axis)  # (T, R/2)
    angles = places * _frequencies(rotary_dim, theta, position_ids.device)
    return angles.cos(), angles.sin()


def _frequencies(rotary_dim: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    return 1.0 / theta**exponents
