"""Greedy selection of diverse tokens in every segment: max-min distance, determinant, coverage, residual energy.

Shapes: S segments packed into N tokens (`cu_seqlens`), D width, K rows of the output. cos is the cosine of two tokens
of a segment, P the tokens picked so far, r the relevance (1 where it is not given); every step picks the largest of

    max_min    min_p (1 - cos_jp); at first, the distance to the nearest other token      DivPrune, arXiv 2503.02175
    dpp        r_j^2 d_j, d_j = det(cos of P and j) / det(cos of P): greedy MAP of r cos r CDPruner, arXiv 2506.10967
    coverage   r_j sum_i max(0, cos_ij - max(0, max_p cos_ip))                             SCOPE, arXiv 2510.24214
    residual   r_j |x_j - (x_j projected on the span of P)|^2                           ResPrune, arXiv 2603.21105

d_j comes from a Cholesky factor that grows by a row a step; where it falls below SPANNED, token j is in the span of P
and counts 0. Coverage adds up cosines in fixed point: sums are exact in every order, and after a pick only the rows of
tokens that it covers better (N ln K in all, not N K) have to be looked at again.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from . import _native  # noqa: F401 - its C++ implementation registers itself
from ._triton import accumulator_dtype, cdiv, device_of, dot, next_power_of_2, tl, triton
from .token_select import check_packing, kept_cu_seqlens, rows_kept, segment_range

METHODS = ("max_min", "dpp", "coverage", "residual")
SPANNED = tl.constexpr(1e-5)  # of a token's squared norm: rounding errors in fp32 are below
SAME = tl.constexpr(1e-6)  # a distance below it is 0, so that copies of a token are equal
ONE = tl.constexpr(1 << 20)  # a cosine of 1 in fixed point
WORST = tl.constexpr(-3e38)  # a token with NaN or inf comes last
MOST_PAIRS = 1 << 25  # cosines that are held at once (128 MiB); beyond, a row is computed when it is needed
CHUNK = 256  # rows of cosines that the reference holds at once


# 1. reference ---------------------------------------------------------------------------------------------------------
def greedy_diverse_reference(
    tokens: Tensor, cu_seqlens: Tensor, relevance: Tensor | None, budget: Tensor | None,
    k: int, total: int, max_seqlen: int, method: str, in_order: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    new_cu = kept_cu_seqlens(cu_seqlens, budget, k, total)
    index = new_cu.new_full((total,), -1)
    bounds = zip(pairwise(cu_seqlens.tolist()), pairwise(new_cu.tolist()), strict=True)
    for (first, last), (start, end) in bounds:
        if start < end:
            weight = None if relevance is None else relevance[first:last]
            picked = _pick(tokens[first:last], weight, end - start, method)
            index[start:end] = (picked.sort().values if in_order else picked) + first
    return index, new_cu.int()


def _pick(x: Tensor, relevance: Tensor | None, k: int, method: str) -> Tensor:
    """Return the tokens (k,) of one segment in the order in which they are picked."""
    x = x.to(accumulator_dtype(x.dtype))
    norm = torch.linalg.vector_norm(x, dim=-1)
    norm = norm.masked_fill(norm.isinf(), torch.nan)
    unit = x / norm.clamp(min=1e-12).unsqueeze(-1)
    weight = torch.ones_like(norm) if relevance is None else relevance.to(x.dtype)
    if method == "dpp":
        weight = weight * weight
    elif method == "residual":
        weight = weight * norm * norm
    d = (norm > 0).to(x.dtype)  # dpp, residual: what a token has outside of the span of the picked ones
    rows = x.new_zeros((k, len(x)))  # of the Cholesky factor
    cover = torch.zeros_like(norm)  # coverage, max_min: the largest cosine with a picked token
    cosines = None
    if method == "coverage":  # in fixed point, the same in both triangles
        upper = ((unit @ unit.T).nan_to_num(0.0).clamp(min=0) * ONE.value + 0.5).long().triu(1)
        cosines = upper + upper.T + ((norm > 0) * ONE.value).long().diag()
        cover = torch.zeros_like(cosines[0])
    taken = torch.zeros_like(norm, dtype=torch.bool)
    picked: list[Tensor] = []
    while (step := len(picked)) < k:
        if cosines is not None:
            score = weight * (cosines - cover).clamp(min=0).sum(1).to(x.dtype)
        elif method == "max_min":
            distance = 1 - (cover if step else _nearest(unit))
            score = torch.where(distance < SAME.value, 0, distance)
        else:
            score = weight * torch.where(d < SPANNED.value, 0, d)
        score = torch.where(score.isnan() | norm.isnan(), WORST.value, score).masked_fill(taken, -torch.inf)
        j = score.argmax()  # the first of equals
        picked.append(j)
        taken = taken.index_fill(0, j, True)
        cosine = unit @ unit[j] if cosines is None else cosines[j]
        if method in ("max_min", "coverage"):
            cover = cosine if method == "max_min" and step == 0 else torch.maximum(cover, cosine)
        else:
            row = (cosine - rows[:step, j] @ rows[:step]) * d[j].clamp(min=SPANNED.value).rsqrt()
            rows[step] = torch.where(d[j] < SPANNED.value, 0, row)
            d = d - rows[step] * rows[step]
    return torch.stack(picked)


def _nearest(unit: Tensor) -> Tensor:
    """Return the largest cosine (N,) of every token with another one; -inf for an only token."""
    parts = []
    for i, chunk in enumerate(unit.split(CHUNK)):
        cosine = chunk @ unit.T
        cosine.diagonal(i * CHUNK).fill_(-torch.inf)
        parts.append(cosine.nan_to_num(-torch.inf).max(1).values)
    return torch.cat(parts)


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _fixed(cosine):
    """Return the positive part of a cosine as int32 in units of 1 / ONE; NaN as 0."""
    return (tl.where(cosine > 0.0, cosine, 0.0) * ONE + 0.5).to(tl.int32)


@triton.jit
def _length(norm):
    return tl.where(norm < float("inf"), tl.maximum(tl.sqrt(norm), 1e-12), float("nan"))


@triton.jit
def _itself(cosine):
    """Return the cosine of a token with itself, without rounding: 1, or 0 of a token of zeros."""
    return tl.where(cosine > 0.5, 1.0, cosine)


@triton.jit
def _pairs_kernel(
    x_ptr, cu_ptr, norm_ptr, part_ptr, cosine_ptr, N, D, M, TILES,
    METHOD: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of a segment's cosines: kept (HELD), and each row's maximum or sum of positive parts over the tile.

    Segments share axis 0 of the grid with the lines of tiles: the others end at 65535.
    """
    segment = tl.program_id(0) // TILES
    line = tl.program_id(0) % TILES
    column = tl.program_id(1)
    first = tl.load(cu_ptr + segment).to(tl.int64)
    length = tl.minimum(tl.load(cu_ptr + segment + 1).to(tl.int64) - first, M)
    i = line * BLOCK + tl.arange(0, BLOCK)
    j = column * BLOCK + tl.arange(0, BLOCK)
    if (line * BLOCK < length) & (column * BLOCK < length):
        products = tl.zeros((BLOCK, BLOCK), tl.float32)
        norm_i = tl.zeros((BLOCK,), tl.float32)
        norm_j = tl.zeros((BLOCK,), tl.float32)
        left_ptr = x_ptr + (first + i)[:, None] * D
        right_ptr = x_ptr + (first + j)[None, :] * D
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            left = tl.load(left_ptr + d[None, :], mask=(i < length)[:, None] & (d < D)[None, :], other=0.0)
            right = tl.load(right_ptr + d[:, None], mask=(j < length)[None, :] & (d < D)[:, None], other=0.0)
            products = dot(left, right, products)
            left = left.to(tl.float32)
            right = right.to(tl.float32)
            norm_i += tl.sum(left * left, 1)
            norm_j += tl.sum(right * right, 0)
        cosine = products / (_length(norm_i)[:, None] * _length(norm_j)[None, :])
        cosine = tl.where(i[:, None] == j[None, :], _itself(cosine), cosine)
        inside = (i < length)[:, None] & (j < length)[None, :]
        if HELD:
            at = (segment.to(tl.int64) * M + i)[:, None] * M + j[None, :]
            tl.store(cosine_ptr + at, cosine, mask=inside)
        if METHOD == "max_min":
            others = inside & (i[:, None] != j[None, :]) & (cosine == cosine)
            part = tl.max(tl.where(others, cosine, float("-inf")), 1)
            tl.store(part_ptr + column.to(tl.int64) * N + first + i, part, mask=i < length)
        if METHOD == "coverage":
            part = tl.sum(tl.where(inside, _fixed(cosine), 0), 1)
            tl.store(part_ptr + column.to(tl.int64) * N + first + i, part, mask=i < length)
        if column == 0:
            tl.store(norm_ptr + first + i, norm_i, mask=i < length)


@triton.jit
def _cosines(
    x_ptr, norm_ptr, cosine_ptr, j, n, length, D, HELD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return the cosines of token `j` of a segment with its tokens `n`; x, norm and cosine point to the segment."""
    if HELD:
        return tl.load(cosine_ptr + n, mask=n < length, other=0.0)
    products = tl.zeros((BLOCK_N,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        rows = tl.load(x_ptr + n.to(tl.int64)[:, None] * D + d[None, :],
                       mask=(n < length)[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
        row = tl.load(x_ptr + j * D + d, mask=d < D, other=0.0).to(tl.float32)
        products += tl.sum(rows.to(tl.float32) * row[None, :], 1)
    norms = _length(tl.load(norm_ptr + n, mask=n < length, other=1.0)) * _length(tl.load(norm_ptr + j))
    return tl.where(n == j, _itself(products / norms), products / norms)


@triton.jit
def _score(state, relevance_ptr, norm_ptr, n, length, METHOD: tl.constexpr, HAS_RELEVANCE: tl.constexpr):
    """Return what is compared, of tokens `n`; -inf where a token is taken or absent."""
    score = state
    if METHOD == "max_min":
        score = tl.where(state < SAME, 0.0, state)
    if (METHOD == "dpp") | (METHOD == "residual"):
        score = tl.where(state < SPANNED, 0.0, state)
    if METHOD == "residual":
        score *= tl.load(norm_ptr + n, mask=n < length, other=0.0)
    if HAS_RELEVANCE:
        relevance = tl.load(relevance_ptr + n, mask=n < length, other=0.0).to(tl.float32)
        score *= relevance
        if METHOD == "dpp":
            score *= relevance
    score = tl.where(score == score, score, WORST)
    return tl.where((n < length) & (state != float("-inf")), score, float("-inf"))


@triton.jit
def _lead(score, n0, best, leader):
    """Return the running maximum and where it is: the first of equals."""
    value, at = tl.max(score, 0, return_indices=True)
    leader = tl.where(value > best, n0 + at, leader)
    return tl.maximum(value, best), leader


@triton.jit
def _greedy_kernel(
    x_ptr, cu_ptr, budget_ptr, relevance_ptr, norm_ptr, part_ptr, cosine_ptr, state_ptr, gain_ptr, cover_ptr,
    factor_ptr, index_ptr, new_cu_ptr, S, N, D, M, k, total,
    METHOD: tl.constexpr, HELD: tl.constexpr, HAS_BUDGET: tl.constexpr, HAS_RELEVANCE: tl.constexpr,
    IN_ORDER: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program picks the tokens of one segment; its state lives in L1. Program S writes the padding.

    A barrier stands wherever a thread reads what another one wrote: the state of the leader, a column of the factor.
    """
    segment = tl.program_id(0)
    if segment == S:
        _, _, start, kept = segment_range(cu_ptr, budget_ptr, k, S - 1, total, HAS_BUDGET, 128)
        tl.store(new_cu_ptr + S, (start + kept).to(tl.int32))
        for r0 in range(start + kept, total, BLOCK_N):
            row = r0 + tl.arange(0, BLOCK_N).to(tl.int64)
            tl.store(index_ptr + row, tl.full((BLOCK_N,), -1, tl.int64), mask=row < total)
        return
    first, length, start, kept = segment_range(cu_ptr, budget_ptr, k, segment, total, HAS_BUDGET, 128)
    tl.store(new_cu_ptr + segment, start.to(tl.int32))
    length = tl.minimum(length, M)
    for r0 in range(length, kept, BLOCK_N):  # a max_seqlen that was too small
        row = r0 + tl.arange(0, BLOCK_N).to(tl.int64)
        tl.store(index_ptr + start + row, tl.full((BLOCK_N,), -1, tl.int64), mask=row < kept)
    kept = tl.minimum(kept, length)
    x_ptr += first * D
    norm_ptr += first
    part_ptr += first
    state_ptr += first
    gain_ptr += first
    cover_ptr += first
    before_ptr = cover_ptr + N
    better_ptr = before_ptr + N
    factor_ptr += first
    index_ptr += start
    cosine_ptr += segment.to(tl.int64) * M * M
    if HAS_RELEVANCE:
        relevance_ptr += first

    best = tl.full((), float("-inf"), tl.float32)
    leader = tl.zeros((), tl.int64)
    for n0 in range(0, length, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        norm = tl.load(norm_ptr + n, mask=n < length, other=0.0)
        if (METHOD == "dpp") | (METHOD == "residual"):
            state = tl.where(norm > 0.0, 1.0, 0.0)
        else:
            state = tl.full((BLOCK_N,), float("-inf"), tl.float32)
            gain = tl.zeros((BLOCK_N,), tl.int64)
            for c0 in range(0, (length + TILE - 1) // TILE, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)
                inside = (c * TILE < length)[:, None] & (n < length)[None, :]
                at = part_ptr + c.to(tl.int64)[:, None] * N + n[None, :]
                if METHOD == "max_min":
                    state = tl.maximum(state, tl.max(tl.load(at, mask=inside, other=float("-inf")), 0))
                else:
                    gain += tl.sum(tl.load(at, mask=inside, other=0).to(tl.int64), 0)
            state = 1.0 - state
            if METHOD == "coverage":
                state = gain.to(tl.float32)
                tl.store(gain_ptr + n, gain, mask=n < length)
                tl.store(cover_ptr + n, tl.zeros((BLOCK_N,), tl.int32), mask=n < length)
        state = tl.where(norm < float("inf"), state, float("nan"))
        tl.store(state_ptr + n, state, mask=n < length)
        score = _score(state, relevance_ptr, norm_ptr, n, length, METHOD, HAS_RELEVANCE)
        best, leader = _lead(score, n0, best, leader)
    tl.debug_barrier()

    for step in range(kept):
        j = leader
        tl.store(index_ptr + step, first + j)
        pivot = tl.load(state_ptr + j)
        count = tl.zeros((), tl.int32)
        if METHOD == "coverage":  # which tokens does it cover better?
            for n0 in range(0, length, BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                cosine = _cosines(x_ptr, norm_ptr, cosine_ptr + j * M, j, n, length, D, HELD, BLOCK_N, BLOCK_D)
                before = tl.load(cover_ptr + n, mask=n < length, other=0)
                better = ((n < length) & (_fixed(cosine) > before)).to(tl.int32)
                tl.store(better_ptr + count + tl.cumsum(better, 0) - 1, n, mask=better == 1)
                tl.store(before_ptr + n, before, mask=n < length)
                tl.store(cover_ptr + n, tl.maximum(before, _fixed(cosine)), mask=n < length)
                count += tl.sum(better, 0)
        tl.debug_barrier()
        best = tl.full((), float("-inf"), tl.float32)
        for n0 in range(0, length, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            state = tl.load(state_ptr + n, mask=n < length, other=0.0)
            if METHOD == "coverage":  # their share of every gain falls
                gain = tl.load(gain_ptr + n, mask=n < length, other=0)
                if HELD:
                    for c0 in range(0, count, BLOCK_C):
                        c = c0 + tl.arange(0, BLOCK_C)
                        i = tl.load(better_ptr + c, mask=c < count, other=0).to(tl.int64)
                        old = tl.load(before_ptr + i, mask=c < count, other=0)[:, None]
                        new = tl.load(cover_ptr + i, mask=c < count, other=0)[:, None]
                        inside = (c < count)[:, None] & (n < length)[None, :]
                        fixed = _fixed(tl.load(cosine_ptr + i[:, None] * M + n[None, :], mask=inside, other=0.0))
                        gain += tl.sum(tl.maximum(fixed - new, 0) - tl.maximum(fixed - old, 0), 0).to(tl.int64)
                else:
                    for c in range(count):
                        i = tl.load(better_ptr + c).to(tl.int64)
                        fixed = _fixed(_cosines(x_ptr, norm_ptr, cosine_ptr, i, n, length, D, HELD, BLOCK_N, BLOCK_D))
                        gain += tl.maximum(fixed - tl.load(cover_ptr + i), 0).to(tl.int64)
                        gain -= tl.maximum(fixed - tl.load(before_ptr + i), 0).to(tl.int64)
                tl.store(gain_ptr + n, gain, mask=n < length)
                state = tl.where((state == float("-inf")) | (state != state), state, gain.to(tl.float32))
            else:
                cosine = _cosines(x_ptr, norm_ptr, cosine_ptr + j * M, j, n, length, D, HELD, BLOCK_N, BLOCK_D)
                if METHOD == "max_min":
                    state = tl.where(step == 0, 1.0 - cosine, tl.minimum(state, 1.0 - cosine))
                else:
                    row = cosine
                    for c0 in range(0, step, BLOCK_C):
                        c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
                        column = tl.load(factor_ptr + c * N + j, mask=c < step, other=0.0)
                        inside = (c < step)[:, None] & (n < length)[None, :]
                        rows = tl.load(factor_ptr + c[:, None] * N + n[None, :], mask=inside, other=0.0)
                        row -= tl.sum(rows * column[:, None], 0)
                    row = tl.where(pivot < SPANNED, 0.0, row * tl.rsqrt(tl.maximum(pivot, SPANNED)))
                    tl.store(factor_ptr + step * N + n, row, mask=n < length)
                    state -= row * row
            state = tl.where(n == j, float("-inf"), state)
            tl.store(state_ptr + n, state, mask=n < length)
            score = _score(state, relevance_ptr, norm_ptr, n, length, METHOD, HAS_RELEVANCE)
            best, leader = _lead(score, n0, best, leader)
        tl.debug_barrier()

    if IN_ORDER:
        row = tl.zeros((), tl.int64)
        for n0 in range(0, length, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            state = tl.load(state_ptr + n, mask=n < length, other=0.0)
            taken = ((n < length) & (state == float("-inf"))).to(tl.int64)
            tl.store(index_ptr + row + tl.cumsum(taken, 0) - 1, first + n, mask=taken == 1)
            row += tl.sum(taken, 0)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(
    method: str, max_seqlen: int, width: int, dtype: torch.dtype, held: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tiles of the kernel for pairs and of the greedy one: none spills on a target."""
    wide = dtype == torch.float32
    block_d = max(16, min(32 if wide else 64, next_power_of_2(width)))
    pairs = {"BLOCK": 64 if max_seqlen > 1024 and not wide else 32, "BLOCK_D": block_d, "num_warps": 4}
    if held:
        block_n = max(64, min(1024, next_power_of_2(max_seqlen)))
        warps = max(1, block_n // 128) * (2 if method == "coverage" else 1)
        return pairs, {
            "BLOCK_N": block_n,
            "BLOCK_C": 2 if method == "max_min" else 4,
            "BLOCK_D": 16,
            "num_warps": warps,
        }
    block_n = 64 if method == "max_min" else 128
    return pairs, {
        "BLOCK_N": block_n,
        "BLOCK_C": 8,
        "BLOCK_D": max(16, min(32, next_power_of_2(width))),
        "num_warps": 8,
    }


def greedy_diverse_triton(
    tokens: Tensor, cu_seqlens: Tensor, relevance: Tensor | None, budget: Tensor | None,
    k: int, total: int, max_seqlen: int, method: str, in_order: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, width = tokens.shape
    segments = cu_seqlens.shape[0] - 1
    if tokens.dtype == torch.float64 or segments == 0 or width == 0:
        return greedy_diverse_reference(tokens, cu_seqlens, relevance, budget, k, total, max_seqlen, method, in_order)
    tokens, cu_seqlens = tokens.contiguous(), cu_seqlens.contiguous()
    relevance = None if relevance is None else relevance.contiguous()
    budget = None if budget is None else budget.contiguous()
    most = max(1, min(max_seqlen, n))
    held = segments * most * most <= MOST_PAIRS
    pairs, greedy = _config(method, most, width, tokens.dtype, held)
    tiles, in_pairs = cdiv(most, pairs["BLOCK"]), method in ("max_min", "coverage")
    steps = min(total, most) if budget is not None else min(k, total, most)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return tokens.new_empty(shape, dtype=dtype)

    coverage = method == "coverage"
    norm, state = scratch(n), scratch(n)
    part = scratch(tiles if in_pairs else 0, n, dtype=torch.int32 if coverage else torch.float32)
    cosine = scratch(segments if held else 0, most, most)
    gain, cover = scratch(n if coverage else 0, dtype=torch.int64), scratch(3, n if coverage else 0, dtype=torch.int32)
    factor = scratch(0 if in_pairs else steps, n)
    index = cu_seqlens.new_empty((total,), dtype=torch.int64)
    new_cu = cu_seqlens.new_empty((segments + 1,), dtype=torch.int32)
    with device_of(tokens):
        # where rows of cosines are computed on demand, the first column of tiles leaves the norms
        _pairs_kernel[(tiles * segments, tiles if held or in_pairs else 1)](
            tokens, cu_seqlens, norm, part, cosine, n, width, most, tiles, METHOD=method, HELD=held, **pairs
        )
        _greedy_kernel[(segments + 1,)](
            tokens, cu_seqlens, budget, relevance, norm, part, cosine, state, gain, cover, factor, index, new_cu,
            segments, n, width, most, min(k, n), total, METHOD=method, HELD=held, HAS_BUDGET=budget is not None,
            HAS_RELEVANCE=relevance is not None, IN_ORDER=in_order, TILE=pairs["BLOCK"], **greedy,
        )  # fmt: skip
    return index, new_cu


# 4. operator ----------------------------------------------------------------------------------------------------------
_greedy_diverse = torch.library.custom_op(
    "fastmllm::greedy_diverse",
    greedy_diverse_reference,
    mutates_args=(),
    schema="(Tensor tokens, Tensor cu_seqlens, Tensor? relevance, Tensor? budget, SymInt k, SymInt total,"
    " SymInt max_seqlen, str method, bool in_order) -> (Tensor, Tensor)",
)
_greedy_diverse.register_kernel("cuda")(greedy_diverse_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_greedy_diverse.register_fake
def _(tokens, cu_seqlens, relevance, budget, k, total, max_seqlen, method, in_order):
    index = cu_seqlens.new_empty((total,), dtype=torch.int64)
    return index, cu_seqlens.new_empty((cu_seqlens.shape[0],), dtype=torch.int32)


# 6. autograd ----------------------------------------------------------------------------------------------------------
# none: an index has no gradient, it flows through what is gathered with it


# 7. public function ---------------------------------------------------------------------------------------------------
def greedy_diverse(
    tokens: Tensor,
    cu_seqlens: Tensor,
    keep: int | Tensor,
    method: str = "max_min",
    relevance: Tensor | None = None,
    in_order: bool = True,
    total: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick diverse tokens of every segment, greedily; the formulas stand at the top of the file.

    Of equal scores the earlier token is picked; tokens with NaN or inf come last. Segments do not influence each other.
    A segment that is not longer than its budget is kept whole. Nothing waits for the device.

    Args:
        tokens: (N, D) float packed tokens; similarity is their cosine, in fp32.
        cu_seqlens: (S+1,) int32 or int64, where segments begin, from 0.
        keep: tokens to keep of every segment, or (S,) int32 or int64 on the device, one a segment (negative: 0).
        method: "max_min", "dpp", "coverage" or "residual".
        relevance: (N,) float, at least 0, weighs the tokens; None = 1 each. Not for "max_min". CDPruner scales it to
            0..1 within a segment first, SCOPE takes the CLS token's attention.
        in_order: return a segment's tokens in their order, else in the order of picking (a prefix of it is what a
            smaller budget picks).
        total: K, rows of the output. None: min(N, S * keep); a budget on the device needs it. Budgets that add up to
            more are cut from the last segment on.
        max_seqlen: tokens of the longest segment (a smaller number leaves the last ones out); None = N.

    Returns:
        index (K,) int64 into the packed tokens, and its cu_seqlens (S+1,) int32. Rows from cu_seqlens[S] on are
        padding: -1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the method is unknown.

    DivPrune, CDPruner, SCOPE and ResPrune, as their formulas say; see the top of the file.
    """
    name = "fastmllm::greedy_diverse"
    if method not in METHODS:
        raise ValueError(f"{name}: method {method!r} must be one of {', '.join(METHODS)}")
    if tokens.dim() != 2 or not tokens.is_floating_point():
        raise ValueError(f"{name}: tokens {tuple(tokens.shape)} {tokens.dtype} must be float (N, D)")
    if relevance is not None and method == "max_min":
        raise ValueError(f"{name}: max_min takes no relevance {tuple(relevance.shape)}")
    if relevance is not None and (relevance.shape != tokens.shape[:1] or not relevance.is_floating_point()):
        raise ValueError(f"{name}: relevance {tuple(relevance.shape)} {relevance.dtype} must be float (N,) with tokens "
                         f"{tuple(tokens.shape)}")  # fmt: skip
    check_packing(name, tokens, cu_seqlens, keep, *(() if relevance is None else (relevance,)))
    n, segments = tokens.shape[0], cu_seqlens.shape[0] - 1
    budget = keep if isinstance(keep, Tensor) else None
    return _greedy_diverse(
        tokens.detach(), cu_seqlens, None if relevance is None else relevance.detach(), budget,
        0 if budget is not None else keep, rows_kept(name, n, segments, keep, total),
        n if max_seqlen is None else min(max_seqlen, n), method, in_order,
    )  # fmt: skip
