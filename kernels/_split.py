"""Few queries, many keys: how many parts to split the keys into, and the kernel that puts the parts together.

Flash-decoding (Dao et al., 2023): each part leaves its own result in fp32; nothing is atomic, so sums are repeatable.
"""

from __future__ import annotations

from torch import Tensor

from ._tiles import store_tile
from ._triton import cdiv, next_power_of_2, tl, triton

PROGRAMS = 264  # two programs an SM of the largest part (132)
PART_BLOCKS = 4  # key blocks that a part has at least: below, its start and its combination cost more than they save
MAX_PARTS = 64


def part_count(programs: int, keys: int, block_n: int, rows: int) -> int:
    """Return into how many parts to split up to `keys` keys that `rows` (row, head) pairs of a key head see.

    `programs` are those of one such group of rows, not of the batch: a sample's sums must not follow its neighbours.
    A part reads at least twice the bytes (of 16-bit keys and values) that its fp32 result costs: with a large batch,
    which needs no split, that bounds what the split wastes.
    """
    least = max(PART_BLOCKS * block_n, 4 * rows)
    return max(1, min(PROGRAMS // max(programs, 1), keys // least, MAX_PARTS))


@triton.jit(do_not_specialize=["T", "parts"])
def _combine_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, T, parts, HEADS: tl.constexpr, D: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the parts of rows, or WEIGHTED, average them by their log-sum-exp, which is then put together too."""
    items = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # (row, head) pairs
    count = T * HEADS
    inside = items < count
    near = tl.where(inside, items, 0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    tile = near[:, None] * D + d[None, :]
    stats = near % HEADS * T + near // HEADS
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WEIGHTED:
        for part in range(parts):
            peak = tl.maximum(peak, tl.load(part_lse_ptr + stats + (near * 0 + part) * count))
    anchor = tl.where(peak == float("-inf"), 0.0, peak)  # a row may have seen nothing at all
    for part in range(parts):
        one = tl.load(part_ptr + tile + (near * 0 + part)[:, None] * count * D, mask=(d < D)[None, :], other=0.0)
        if WEIGHTED:
            weight = tl.exp(tl.load(part_lse_ptr + stats + (near * 0 + part) * count) - anchor)
            total += weight
            acc += weight[:, None] * one
        else:
            acc += one
    if WEIGHTED:
        blind = total == 0.0
        total = tl.where(blind, 1.0, total)
        acc = acc / total[:, None]
        tl.store(lse_ptr + stats, tl.where(blind, float("-inf"), anchor + tl.log(total)), mask=inside)
    store_tile(out_ptr, acc, items, count, D, D, BLOCK_D)


def combine(parts: Tensor, part_lse: Tensor | None, out: Tensor, lse: Tensor | None) -> None:
    """Write the sum of parts (P, T, H, D) to `out`; with log-sum-exps (P, H, T), their softmax over all keys."""
    count, total, heads, d = parts.shape
    block_d = max(16, next_power_of_2(d))
    block_m = 1024 // block_d
    _combine_kernel[(cdiv(total * heads, block_m),)](
        parts, part_lse, out, lse, total, count, HEADS=heads, D=d, WEIGHTED=part_lse is not None, BLOCK_M=block_m,
        BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
