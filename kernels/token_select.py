"""Token selection: the best-scored tokens of every segment, in their order, gathered with their side planes.

Shapes: S segments packed into N tokens (`cu_seqlens`), D width, K rows of the output. It is the second half of score
based pruning (FastV, PyramidDrop, VisionZip's dominant tokens, FasterVLM): scores in, a shorter packed batch out.
The number of rows K is known to the host, how many each segment keeps only to the device: the output is packed from
the front, its tail is padding (zeros, index -1), and the new `cu_seqlens` ends where the padding begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native  # noqa: F401 - its C++ implementation registers itself
from ._triton import cdiv, device_of, next_power_of_2, tl, triton

MOST_PROGRAMS = 1 << 30  # of a launch, which ends below 2^31
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # rows are copied as bits


# 1. reference ---------------------------------------------------------------------------------------------------------
def token_select_reference(
    xs: list[Tensor], cu_seqlens: Tensor, scores: Tensor, budget: Tensor | None, k: int, total: int, max_seqlen: int
) -> list[Tensor]:
    n = scores.shape[0]
    cu_seqlens = cu_seqlens.long()
    new_cu = kept_cu_seqlens(cu_seqlens, budget, k, total)
    token = torch.arange(n, device=scores.device)
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)  # S behind the last segment
    order = ((segment << 32) - _ordered(scores)).sort(stable=True).indices  # by segment, then best first
    rank = torch.empty_like(token).scatter_(0, order, token) - cu_seqlens[segment]
    kept = rank < torch.nn.functional.pad(new_cu.diff(), (0, 1))[segment]
    place = torch.where(kept, kept.cumsum(0) - 1, -1)
    index = token.new_full((total + 1,), -1).scatter_(0, torch.where(kept, place, total), token)[:total]
    ys = [_zero_behind(x.index_select(0, index.clamp(min=0)), index) for x in xs]
    return [*ys, index, place.int(), new_cu.int()]


def kept_cu_seqlens(cu_seqlens: Tensor, budget: Tensor | None, k: int, total: int) -> Tensor:
    """Return cu_seqlens (S+1,) of what is kept: at most the budget, the segment, and `total` rows in all."""
    lengths = cu_seqlens.long().diff()
    kept = lengths.clamp(max=k) if budget is None else torch.minimum(lengths, budget.long().clamp(min=0))
    return torch.nn.functional.pad(kept.cumsum(0), (1, 0)).clamp(max=total)


def _ordered(scores: Tensor) -> Tensor:
    """Return int64 keys that compare as the fp32 scores do: -0 equals 0, NaN is below -inf."""
    bits = (scores.float() + 0.0).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return torch.where(scores.isnan(), -(2**31), keys).long()


def _zero_behind(rows: Tensor, index: Tensor) -> Tensor:
    return rows.masked_fill_((index < 0).view(-1, *[1] * (rows.dim() - 1)), 0)


def token_select_bwd_reference(grads: list[Tensor], index: Tensor, place: Tensor) -> list[Tensor]:
    n = place.shape[0]
    to = torch.where(index < 0, n, index)  # padding goes behind the end
    return [g.new_zeros((n + 1, *g.shape[1:])).index_copy_(0, to, g)[:n] for g in grads]


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def segment_range(cu_ptr, budget_ptr, k, segment, total, HAS_BUDGET: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return where a segment begins, its length, where its kept tokens begin, and how many there are."""
    start = tl.zeros((), tl.int64)
    for s0 in range(0, segment, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        length = tl.load(cu_ptr + s + 1, mask=s < segment, other=0) - tl.load(cu_ptr + s, mask=s < segment, other=0)
        if HAS_BUDGET:
            kept = tl.minimum(length, tl.maximum(tl.load(budget_ptr + s, mask=s < segment, other=0), 0))
        else:
            kept = tl.minimum(length, k)
        start += tl.sum(kept.to(tl.int64), 0)
    start = tl.minimum(start, total)
    first = tl.load(cu_ptr + segment).to(tl.int64)
    length = tl.load(cu_ptr + segment + 1).to(tl.int64) - first
    if HAS_BUDGET:
        kept = tl.maximum(tl.load(budget_ptr + segment).to(tl.int64), 0)
    else:
        kept = tl.zeros((), tl.int64) + k
    return first, length, start, tl.minimum(tl.minimum(kept, length), total - start)


@triton.jit
def _keys(score_ptr, n, length):
    """Load scores as int64 in 0..2^32 that compare as they do: -0 equals 0, NaN is 0, below -inf."""
    score = tl.load(score_ptr + n, mask=n < length, other=0.0).to(tl.float32)
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return tl.where(score != score, 0, keys)


@triton.jit
def _fwd_kernel(
    xs, ys, widths, cu_ptr, score_ptr, budget_ptr, index_ptr, place_ptr, new_cu_ptr, S, N, k, total, BLOCKS,
    HAS_BUDGET: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every program finds its segment's threshold, by digits from the top, then moves its share of the tokens.

    The threshold is found again by every program of a segment: a few microseconds beside each other instead of a
    second launch. Segment S has the tokens and the rows behind the last one. BLOCKS programs have a segment, all on
    one axis of the grid: the others end at 65535.
    """
    segment = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    if segment < S:
        first, length, start, kept = segment_range(cu_ptr, budget_ptr, k, segment, total, HAS_BUDGET, 128)
    else:
        _, _, start, kept = segment_range(cu_ptr, budget_ptr, k, S - 1, total, HAS_BUDGET, 128)
        start += kept
        kept = tl.zeros((), tl.int64)
        first = tl.load(cu_ptr + S).to(tl.int64)
        length = N - first
    if block == 0:
        tl.store(new_cu_ptr + segment, start.to(tl.int32))
    score_ptr += first
    threshold = tl.zeros((), tl.int64)
    need = kept  # of the tokens that equal the threshold, so many are kept
    if (kept > 0) & (kept < length):
        for step in tl.static_range(4):
            shift = 24 - 8 * step
            counts = tl.zeros((256,), tl.int32)
            for n0 in range(0, length, BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                keys = _keys(score_ptr, n, length)
                open = (n < length) & ((keys >> (shift + 8)) == (threshold >> (shift + 8)))
                counts += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=open)
            above = tl.cumsum(counts, 0, reverse=True).to(tl.int64)  # tokens with this digit or a larger one
            digit = tl.sum((above >= need).to(tl.int64), 0) - 1
            need -= tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0), 0)
            threshold += digit << shift
    elif kept > 0:
        threshold -= 1  # the whole segment
    else:
        threshold += 1 << 40
    for t0 in range(block * BLOCK_T, length, BLOCKS * BLOCK_T):
        larger = tl.zeros((BLOCK_N,), tl.int32)  # before this block
        equal = tl.zeros((BLOCK_N,), tl.int32)
        for n0 in range(0, t0, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            keys = _keys(score_ptr, n, length)
            larger += ((n < t0) & (keys > threshold)).to(tl.int32)
            equal += ((n < t0) & (keys == threshold)).to(tl.int32)
        num_equal = tl.sum(equal, 0)
        t = t0 + tl.arange(0, BLOCK_T)
        keys = _keys(score_ptr, t, length)
        same = ((t < length) & (keys == threshold)).to(tl.int32)
        keep = (t < length) & ((keys > threshold) | ((same == 1) & (num_equal + tl.cumsum(same, 0) <= need)))
        before = start + tl.sum(larger, 0) + tl.minimum(num_equal, need)
        to = before + tl.cumsum(keep.to(tl.int64), 0) - 1
        token = first + t.to(tl.int64)
        tl.store(place_ptr + token, tl.where(keep, to, -1).to(tl.int32), mask=t < length)
        tl.store(index_ptr + to, token, mask=keep)
        for i in tl.static_range(len(xs)):
            for d0 in range(0, widths[i], BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                mask = keep[:, None] & (d < widths[i])[None, :]
                rows = tl.load(xs[i] + token[:, None] * widths[i] + d[None, :], mask=mask, other=0)
                tl.store(ys[i] + to[:, None] * widths[i] + d[None, :], rows, mask=mask)
    if segment == S:
        for r0 in range(start + block * BLOCK_T, total, BLOCKS * BLOCK_T):
            row = r0 + tl.arange(0, BLOCK_T).to(tl.int64)
            tl.store(index_ptr + row, tl.full((BLOCK_T,), -1, tl.int64), mask=row < total)
            for i in tl.static_range(len(ys)):
                for d0 in range(0, widths[i], BLOCK_D):
                    d = d0 + tl.arange(0, BLOCK_D)
                    zeros = tl.zeros((BLOCK_T, BLOCK_D), ys[i].dtype.element_ty)
                    mask = (row < total)[:, None] & (d < widths[i])[None, :]
                    tl.store(ys[i] + row[:, None] * widths[i] + d[None, :], zeros, mask=mask)


@triton.jit
def _bwd_kernel(grads, dxs, widths, place_ptr, N, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Every row of the gradient is written once: what was kept from its place, zeros elsewhere."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.load(place_ptr + token, mask=token < N, other=-1).to(tl.int64)
    for i in tl.static_range(len(grads)):
        for d0 in range(0, widths[i], BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            inside = (d < widths[i])[None, :]
            rows = tl.load(
                grads[i] + place[:, None] * widths[i] + d[None, :], mask=(place >= 0)[:, None] & inside, other=0
            )
            tl.store(dxs[i] + token[:, None] * widths[i] + d[None, :], rows, mask=(token < N)[:, None] & inside)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(max_seqlen: int, width: int) -> dict[str, int]:
    block_n = max(256, min(1024, next_power_of_2(max_seqlen)))
    return {"BLOCK_N": block_n, "BLOCK_T": 16, "BLOCK_D": min(256, next_power_of_2(width)), "num_warps": 4}


def _bits(rows: Tensor) -> Tensor:
    return rows.view(INTEGERS[rows.element_size()])


def _widths(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(t[0].numel() if t.shape[0] else 0 for t in tensors)


def token_select_triton(
    xs: list[Tensor], cu_seqlens: Tensor, scores: Tensor, budget: Tensor | None, k: int, total: int, max_seqlen: int
) -> list[Tensor]:
    n, segments = scores.shape[0], cu_seqlens.shape[0] - 1
    if any(x.element_size() not in INTEGERS for x in xs) or segments == 0:
        return token_select_reference(xs, cu_seqlens, scores, budget, k, total, max_seqlen)
    xs = [x.contiguous() for x in xs]
    cu_seqlens, scores = cu_seqlens.contiguous(), scores.contiguous()
    budget = None if budget is None else budget.contiguous()
    ys = [x.new_empty((total, *x.shape[1:])) for x in xs]
    index = cu_seqlens.new_empty((total,), dtype=torch.int64)
    place = cu_seqlens.new_empty((n,), dtype=torch.int32)
    new_cu = cu_seqlens.new_empty((segments + 1,), dtype=torch.int32)
    widths = _widths(xs)
    config = _config(max_seqlen, max(widths))
    blocks = min(cdiv(max(max_seqlen, 1), config["BLOCK_T"]), max(1, MOST_PROGRAMS // (segments + 1)))
    with device_of(scores):
        _fwd_kernel[(blocks * (segments + 1),)](
            tuple(map(_bits, xs)), tuple(map(_bits, ys)), widths, cu_seqlens, scores, budget, index, place, new_cu,
            segments, n, min(k, n), total, blocks, HAS_BUDGET=budget is not None, **config,
        )  # fmt: skip
    return [*ys, index, place, new_cu]


def token_select_bwd_triton(grads: list[Tensor], index: Tensor, place: Tensor) -> list[Tensor]:
    if any(g.element_size() not in INTEGERS for g in grads):
        return token_select_bwd_reference(grads, index, place)
    grads, place = [g.contiguous() for g in grads], place.contiguous()
    n = place.shape[0]
    dxs = [g.new_empty((n, *g.shape[1:])) for g in grads]
    widths = _widths(dxs)
    config = _config(1, max(widths, default=1))
    if any(widths):
        with device_of(place):
            _bwd_kernel[(cdiv(n, config["BLOCK_T"]),)](
                tuple(map(_bits, grads)), tuple(map(_bits, dxs)), widths, place, n,
                BLOCK_T=config["BLOCK_T"], BLOCK_D=config["BLOCK_D"], num_warps=config["num_warps"],
            )  # fmt: skip
    return dxs


# 4. operator ----------------------------------------------------------------------------------------------------------
_token_select = torch.library.custom_op(
    "fastmllm::token_select",
    token_select_reference,
    mutates_args=(),
    schema="(Tensor[] xs, Tensor cu_seqlens, Tensor scores, Tensor? budget, SymInt k, SymInt total,"
    " SymInt max_seqlen) -> Tensor[]",
)
_token_select.register_kernel("cuda")(token_select_triton)

_token_select_bwd = torch.library.custom_op(
    "fastmllm::token_select_bwd",
    token_select_bwd_reference,
    mutates_args=(),
    schema="(Tensor[] grads, Tensor index, Tensor place) -> Tensor[]",
)
_token_select_bwd.register_kernel("cuda")(token_select_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_token_select.register_fake
def _(xs, cu_seqlens, scores, budget, k, total, max_seqlen):
    ys = [x.new_empty((total, *x.shape[1:])) for x in xs]
    index = cu_seqlens.new_empty((total,), dtype=torch.int64)
    place = cu_seqlens.new_empty((scores.shape[0],), dtype=torch.int32)
    return [*ys, index, place, cu_seqlens.new_empty((cu_seqlens.shape[0],), dtype=torch.int32)]


@_token_select_bwd.register_fake
def _(grads, index, place):
    return [g.new_empty((place.shape[0], *g.shape[1:])) for g in grads]


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    *_, index, place, new_cu = output
    ctx.save_for_backward(index, place)
    ctx.mark_non_differentiable(index, place, new_cu)
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    wanted = [i for i, need in enumerate(ctx.needs_input_grad[0]) if need and grads[i] is not None]
    out = [None] * len(ctx.needs_input_grad[0])
    if wanted:
        dxs = _token_select_bwd([grads[i].contiguous() for i in wanted], *ctx.saved_tensors)
        for i, dx in zip(wanted, dxs, strict=True):
            out[i] = dx
    return out, None, None, None, None, None, None


_token_select.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def token_select(
    tokens: Tensor,
    cu_seqlens: Tensor,
    scores: Tensor,
    budget: int | Tensor,
    planes: Sequence[Tensor] = (),
    total: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Keep the best-scored tokens of every segment, in their order, and gather side planes with them.

    Equal scores: the earlier token is kept. -0 equals 0, NaN ranks below -inf. A segment that is not longer than its
    budget is kept whole. Nothing waits for the device: the host says how many rows there are at the most.

    Args:
        tokens: (N, D) or (N, ...) packed tokens, any dtype.
        cu_seqlens: (S+1,) int32 or int64, where segments begin, from 0; tokens behind the last one are dropped.
        scores: (N,) float, ranked in fp32; no gradient flows through it.
        budget: tokens to keep of every segment, or (S,) int32 or int64 on the device, one a segment (negative: 0).
        planes: further (N, ...) tensors to gather: positions, sizes, ids, labels, DeepStack features.
        total: K, rows of the output. None: min(N, S * budget); a budget on the device needs it. Budgets that add up
            to more are cut from the last segment on.
        max_seqlen: tokens of the longest segment, sizes the launch; None = N, right but slower for many segments.

    Returns:
        tokens (K, ...), index (K,) int64 into the input, the new cu_seqlens (S+1,) int32, and the planes (K, ...).
        Rows from new cu_seqlens[S] on are padding: zeros, and -1 in index. Floating planes have gradients too.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a budget on the device comes without `total`.

    FastV (arXiv 2403.06764), PyramidDrop (arXiv 2410.17247), VisionZip's dominant tokens (arXiv 2412.04467): torch's
    topk + sort + gather of every segment.
    """
    name = "fastmllm::token_select"
    if tokens.dim() < 1 or scores.shape != tokens.shape[:1] or not scores.is_floating_point():
        raise ValueError(f"{name}: tokens {tuple(tokens.shape)} must be (N, ...) and scores {tuple(scores.shape)} "
                         f"{scores.dtype} float (N,)")  # fmt: skip
    check_packing(name, tokens, cu_seqlens, budget, scores, *planes)
    n, segments = tokens.shape[0], cu_seqlens.shape[0] - 1
    for i, plane in enumerate(planes):
        if plane.dim() < 1 or plane.shape[0] != n:
            raise ValueError(f"{name}: planes[{i}] {tuple(plane.shape)} must be (N, ...) with N = {n}")
    k = budget if isinstance(budget, int) else 0
    total = rows_kept(name, n, segments, budget, total)
    *out, index, _, new_cu = _token_select(
        [tokens, *planes], cu_seqlens, scores.detach(), None if isinstance(budget, int) else budget, k, total,
        n if max_seqlen is None else min(max_seqlen, n),
    )  # fmt: skip
    return out[0], index, new_cu, out[1:]


def check_packing(name: str, tokens: Tensor, cu_seqlens: Tensor, budget: int | Tensor, *others: Tensor) -> None:
    """Raise where packed tokens, segments and budgets do not fit together, or a tensor is on another device."""
    integers = (torch.int32, torch.int64)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in integers:
        raise ValueError(f"{name}: cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} must be int (S+1,)")
    if isinstance(budget, Tensor):
        if budget.shape != (cu_seqlens.shape[0] - 1,) or budget.dtype not in integers:
            raise ValueError(f"{name}: budget {tuple(budget.shape)} {budget.dtype} must be int32 or int64 "
                             f"({cu_seqlens.shape[0] - 1},), one a segment")  # fmt: skip
        others = (*others, budget)
    elif budget < 0:
        raise ValueError(f"{name}: budget {budget} must not be negative")
    for tensor in (cu_seqlens, *others):
        if tensor.device != tokens.device:
            raise ValueError(
                f"{name}: tokens {tuple(tokens.shape)} are on {tokens.device}, but {tuple(tensor.shape)} "
                f"{tensor.dtype} is on {tensor.device}: move one of them"
            )


def rows_kept(name: str, n: int, segments: int, budget: int | Tensor, total: int | None) -> int:
    """Return the rows of the output, known to the host."""
    if total is None and isinstance(budget, Tensor):
        raise ValueError(f"{name}: budget {tuple(budget.shape)} is a tensor: say with total= how many rows it makes")
    if total is not None and total < 0:
        raise ValueError(f"{name}: total {total} must not be negative")
    most = n if isinstance(budget, Tensor) else min(n, segments * budget)
    return most if total is None else min(total, most)
