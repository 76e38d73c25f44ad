"""Token merging: bipartite soft matching and a size-weighted merge (ToMe, Bolya et al., arXiv 2210.09461).

Shapes: T packed tokens of S segments (images), K = T - merged tokens, D width, M metric width. Within a segment, tokens
at even places (A) look for their most similar token at an odd place (B) by cosine; the r best pairs are merged. The
N x N similarity is never stored, nothing is sorted, the sums are deterministic, and the tokens keep their order. The
plan is `destination` (T,): the row that each token went to. The segments before s lose removed[s] tokens. A cosine that
is NaN counts as UNKNOWN, less than any other: such pairs merge last.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native  # noqa: F401 - its C++ implementation registers itself
from ._runs import upload
from ._triton import accumulator_dtype, cdiv, device_of, dot, next_power_of_2, tl, triton

UNKNOWN = -2.0
_UNKNOWN = tl.constexpr(UNKNOWN)
CHUNK = 256  # rows of similarity that the reference holds at once


# 1. reference ---------------------------------------------------------------------------------------------------------
def token_merge_reference(
    x: Tensor, metric: Tensor, size: Tensor, cu_seqlens: Tensor, removed: Sequence[int], max_seqlen: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    starts = cu_seqlens.tolist()
    parts = [torch.zeros(0, dtype=torch.int64, device=x.device)]
    for first, last, gone, after in zip(starts, starts[1:], removed, removed[1:], strict=False):
        best, index = _match_reference(metric[first:last], protected)
        parts.append(_plan_reference(best, index, last - first, after - gone) + (first - gone))
    destination = torch.cat(parts)
    return *_merge_reference(x, size, destination, x.shape[0] - removed[-1]), destination


def _match_reference(metric: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    """Return for each even token of a segment its largest cosine with an odd token, and that token; protected: -inf."""
    unit = torch.nn.functional.normalize(metric.to(accumulator_dtype(metric.dtype)), dim=-1, eps=1e-12)
    a, b = unit[::2], unit[1::2][protected // 2 :].T
    best, index = unit.new_full((a.shape[0],), -torch.inf), torch.zeros_like(a[:, 0], dtype=torch.int64)
    free = (protected + 1) // 2
    if b.shape[1] and a.shape[0] > free:
        parts = [(rows @ b).nan_to_num_(UNKNOWN).max(-1) for rows in a[free:].split(CHUNK)]
        best[free:] = torch.cat([part.values for part in parts])
        index[free:] = torch.cat([part.indices for part in parts])
    return best, 2 * (index + protected // 2) + 1


def _plan_reference(best: Tensor, index: Tensor, n: int, r: int) -> Tensor:
    """Turn the matches of a segment into destinations (n,); of equally similar pairs the earlier one merges."""
    chosen = 2 * best.sort(descending=True, stable=True).indices[:r]
    stays = torch.ones(n, dtype=torch.bool, device=best.device).index_fill_(0, chosen, False)
    place = stays.cumsum(0) - 1
    return place.index_copy(0, chosen, place[index[chosen // 2]])


def _merge_reference(x: Tensor, size: Tensor, destination: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = size.to(accumulator_dtype(x.dtype))
    new_size = wide.new_zeros(kept).index_add_(0, destination, wide)
    sums = wide.new_zeros(kept, x.shape[1]).index_add_(0, destination, x.to(wide.dtype) * wide.unsqueeze(-1))
    return (sums / new_size.unsqueeze(-1)).to(x.dtype), new_size.to(size.dtype), new_size.log().to(size.dtype)


def token_merge_bwd_reference(grad: Tensor, size: Tensor, new_size: Tensor, destination: Tensor) -> Tensor:
    share = size / new_size[destination]  # (T,)
    return (grad[destination].to(share.dtype) * share.unsqueeze(-1)).to(grad.dtype)


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _match_kernel(
    metric_ptr, cu_ptr, best_ptr, partner_ptr, units, protected, BLOCKS,
    UNIT: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A block of even tokens walks over all odd tokens and keeps a running maximum; norms come from the same loads.

    As in the kernels below, a segment has BLOCKS programs, on axis 0 of the grid: the others end at 65535.
    """
    M = units * UNIT  # Triton knows 16 as a divisor of an argument, but heads have 72, 80 or 88 channels
    segment = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    first = tl.load(cu_ptr + segment).to(tl.int64)
    n = (tl.load(cu_ptr + segment + 1) - first).to(tl.int32)
    num_a = (n + 1) // 2
    num_b = n // 2
    begin = block * BLOCK_A
    if begin < num_a:
        a = begin + tl.arange(0, BLOCK_A)
        rows = metric_ptr + first * M
        # int64 up to the block, int32 inside it: tiles of int64 offsets spill
        left_ptr = rows + begin.to(tl.int64) * 2 * M
        right_ptr = rows + M
        even_a = 2 * tl.arange(0, BLOCK_A) * M
        even_b = 2 * tl.arange(0, BLOCK_B) * M
        best = tl.full((BLOCK_A,), float("-inf"), tl.float32)
        index = tl.zeros((BLOCK_A,), tl.int32)
        for start in range(0, num_b, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            products = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
            norm_a = tl.zeros((BLOCK_A,), tl.float32)
            norm_b = tl.zeros((BLOCK_B,), tl.float32)
            for offset in range(0, M, BLOCK_M):
                m = offset + tl.arange(0, BLOCK_M)
                left = tl.load(
                    left_ptr + even_a[:, None] + m[None, :], mask=(a < num_a)[:, None] & (m < M)[None, :], other=0.0
                )
                right = tl.load(
                    right_ptr + even_b[None, :] + m[:, None], mask=(b < num_b)[None, :] & (m < M)[:, None], other=0.0
                )
                products = dot(left, right, products)
                left = left.to(tl.float32)
                right = right.to(tl.float32)
                norm_a += tl.sum(left * left, 1)
                norm_b += tl.sum(right * right, 0)
            inverse_a = 1.0 / tl.maximum(tl.sqrt(norm_a), 1e-12)
            inverse_b = 1.0 / tl.maximum(tl.sqrt(norm_b), 1e-12)
            cosine = products * inverse_a[:, None] * inverse_b[None, :]
            cosine = tl.where(cosine == cosine, cosine, _UNKNOWN)
            cosine = tl.where(((b < num_b) & (2 * b + 1 >= protected))[None, :], cosine, float("-inf"))
            value, where = tl.max(cosine, 1, return_indices=True)
            index = tl.where(value > best, start + where, index)
            best = tl.maximum(value, best)
            right_ptr += 2 * BLOCK_B * M
        best = tl.where(2 * a < protected, float("-inf"), best)
        tl.store(best_ptr + first + 2 * a, best, mask=a < num_a)
        tl.store(partner_ptr + first + 2 * a, 2 * index + 1, mask=a < num_a)


@triton.jit
def _choose_kernel(
    best_ptr, partner_ptr, cu_ptr, removed_ptr, target_ptr, protected, BLOCKS,
    BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rank each even token by counting those before it: the r best get their partner as target, the others -1."""
    segment = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    first = tl.load(cu_ptr + segment).to(tl.int64)
    num_a = ((tl.load(cu_ptr + segment + 1) - first + 1) // 2).to(tl.int32)
    r = tl.load(removed_ptr + segment + 1) - tl.load(removed_ptr + segment)
    begin = block * BLOCK_A
    if begin < num_a:
        a = begin + tl.arange(0, BLOCK_A)
        own = tl.load(best_ptr + first + 2 * a, mask=a < num_a, other=float("-inf"))
        rank = tl.zeros((BLOCK_A,), tl.int32)
        for start in range(0, num_a, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            other = tl.load(best_ptr + first + 2 * c, mask=c < num_a, other=float("-inf"))
            ahead = (other[None, :] > own[:, None]) | ((other[None, :] == own[:, None]) & (c[None, :] < a[:, None]))
            rank += tl.sum((ahead & (c < num_a)[None, :]).to(tl.int32), 1)
        partner = tl.load(partner_ptr + first + 2 * a, mask=a < num_a, other=0)
        target = tl.where((rank < r) & (2 * a >= protected), partner, -1)
        tl.store(target_ptr + first + 2 * a, target, mask=a < num_a)


@triton.jit
def _place_kernel(
    target_ptr, cu_ptr, removed_ptr, destination_ptr, order_ptr, start_ptr, count_ptr, BLOCKS,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Count the merged tokens before each token: where it goes; and group the merged ones by their target, in order."""
    segment = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    first = tl.load(cu_ptr + segment).to(tl.int64)
    n = (tl.load(cu_ptr + segment + 1) - first).to(tl.int32)
    begin = block * BLOCK_N
    if begin < n:
        num_a = (n + 1) // 2
        i = begin + tl.arange(0, BLOCK_N)
        even = i % 2 == 0
        target = tl.load(target_ptr + first + i, mask=(i < n) & even, other=-1)
        merged = target >= 0
        stands = tl.where(merged, target, i)  # the token whose place it takes
        gone = tl.zeros((BLOCK_N,), tl.int32)  # merged tokens before that place
        smaller = tl.zeros((BLOCK_N,), tl.int32)  # merged tokens with an earlier target
        equal = tl.zeros((BLOCK_N,), tl.int32)  # with this one as target
        earlier = tl.zeros((BLOCK_N,), tl.int32)  # of those, the ones before this token
        for start in range(0, num_a, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            to = tl.load(target_ptr + first + 2 * c, mask=c < num_a, other=-1)[None, :]
            gone += tl.sum(((to >= 0) & (2 * c[None, :] < stands[:, None])).to(tl.int32), 1)
            smaller += tl.sum(((to >= 0) & (to < stands[:, None])).to(tl.int32), 1)
            same = to == stands[:, None]
            equal += tl.sum(same.to(tl.int32), 1)
            earlier += tl.sum((same & (2 * c[None, :] < i[:, None])).to(tl.int32), 1)
        place = first - tl.load(removed_ptr + segment) + stands - gone
        tl.store(destination_ptr + first + i, place, mask=i < n)
        tl.store(start_ptr + first + i, smaller, mask=i < n)
        tl.store(count_ptr + first + i, tl.where(merged, -1, equal), mask=i < n)
        tl.store(order_ptr + first + smaller + earlier, i, mask=(i < n) & merged)


@triton.jit
def _fwd_kernel(
    x_ptr, size_ptr, cu_ptr, destination_ptr, order_ptr, start_ptr, count_ptr, y_ptr, new_size_ptr, log_ptr,
    D, K, BLOCKS, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A token that stays adds up what merged into it, in order: no atomics."""
    segment = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    first = tl.load(cu_ptr + segment).to(tl.int64)
    n = tl.load(cu_ptr + segment + 1) - first
    if block < n:
        token = first + block
        count = tl.load(count_ptr + token)  # -1: it merged
        row = tl.load(destination_ptr + token)
        if (count >= 0) & (row < K):
            d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            weight = tl.load(size_ptr + token).to(tl.float32)
            total = weight * tl.load(x_ptr + token * D + d, mask=d < D, other=0.0).to(tl.float32)
            begin = first + tl.load(start_ptr + token)
            for i in range(count):
                source = first + tl.load(order_ptr + begin + i)
                size = tl.load(size_ptr + source).to(tl.float32)
                total += size * tl.load(x_ptr + source * D + d, mask=d < D, other=0.0).to(tl.float32)
                weight += size
            tl.store(y_ptr + row * D + d, (total / weight).to(y_ptr.dtype.element_ty), mask=d < D)
            if tl.program_id(1) == 0:
                tl.store(new_size_ptr + row, weight)
                tl.store(log_ptr + row, tl.log(weight))


@triton.jit
def _bwd_kernel(
    dy_ptr, size_ptr, new_size_ptr, destination_ptr, dx_ptr, T, K, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    to = tl.minimum(tl.load(destination_ptr + n, mask=n < T, other=0), K - 1)
    share = tl.load(size_ptr + n, mask=n < T, other=0.0).to(tl.float32) / tl.load(
        new_size_ptr + to, mask=n < T, other=1.0
    ).to(tl.float32)
    mask = (n < T)[:, None] & (d < D)[None, :]
    dy = tl.load(dy_ptr + to[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + n[:, None] * D + d[None, :], (dy * share[:, None]).to(dx_ptr.dtype.element_ty), mask=mask)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(kernel: str, width: int) -> dict[str, int]:
    """Return the tile of the "match", "plan", "forward" or "backward" kernels: none spills on a target."""
    block = next_power_of_2(width)
    if kernel == "match":  # pairs, and the channels of one product
        return {
            "UNIT": 8 if width % 8 == 0 else 1,
            "BLOCK_A": 64,
            "BLOCK_B": 64,
            "BLOCK_M": max(16, min(64, block)),
            "num_warps": 8,
        }
    if kernel == "plan":  # tokens, and those that they are compared with
        return {"BLOCK": 32, "BLOCK_C": 64, "num_warps": 4}
    if kernel == "forward":
        return {"BLOCK_D": min(1024, block), "num_warps": 4}
    block = min(256, block)
    return {"BLOCK_N": 2048 // block, "BLOCK_D": block, "num_warps": 4}


def match_triton(metric: Tensor, cu_seqlens: Tensor, max_seqlen: int, protected: int) -> tuple[Tensor, Tensor]:
    """Return, at the even places of each segment, the largest cosine and the odd place that it is with."""
    metric = metric.contiguous()
    best = metric.new_empty(metric.shape[0], dtype=torch.float32)
    partner = metric.new_empty(metric.shape[0], dtype=torch.int32)
    config = _config("match", metric.shape[1])
    blocks = cdiv(cdiv(max_seqlen, 2), config["BLOCK_A"])
    if metric.shape[0] and max_seqlen:
        with device_of(metric):
            _match_kernel[(blocks * (cu_seqlens.numel() - 1),)](
                metric, cu_seqlens, best, partner, metric.shape[1] // config["UNIT"], protected, blocks, **config
            )
    return best, partner


def plan_triton(
    best: Tensor, partner: Tensor, cu_seqlens: Tensor, removed: Tensor, max_seqlen: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `destination`, the merged tokens by target, and where those of a token begin and how many they are."""
    tokens, segments = best.shape[0], cu_seqlens.numel() - 1
    target, order, start, count = (torch.empty_like(partner) for _ in range(4))
    destination = partner.new_empty(tokens, dtype=torch.int64)
    config = _config("plan", 0)
    block = config.pop("BLOCK")
    pairs, blocks = cdiv(cdiv(max_seqlen, 2), block), cdiv(max_seqlen, block)
    if tokens and max_seqlen:
        with device_of(best):
            _choose_kernel[(pairs * segments,)](
                best, partner, cu_seqlens, removed, target, protected, pairs, BLOCK_A=block, **config
            )
            _place_kernel[(blocks * segments,)](
                target, cu_seqlens, removed, destination, order, start, count, blocks, BLOCK_N=block, **config
            )
    return destination, order, start, count


def merge_triton(
    x: Tensor, size: Tensor, cu_seqlens: Tensor, plan: tuple[Tensor, Tensor, Tensor, Tensor], max_seqlen: int, kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, size = x.contiguous(), size.contiguous()
    width = x.shape[1]
    y, new_size = x.new_empty((kept, width)), size.new_empty(kept)
    log_size = torch.empty_like(new_size)
    config = _config("forward", width)
    if y.numel() and max_seqlen:
        with device_of(x):
            _fwd_kernel[(max_seqlen * (cu_seqlens.numel() - 1), cdiv(width, config["BLOCK_D"]))](
                x, size, cu_seqlens, *plan, y, new_size, log_size, width, kept, max_seqlen, **config
            )
    return y, new_size, log_size


def token_merge_triton(
    x: Tensor, metric: Tensor, size: Tensor, cu_seqlens: Tensor, removed: Sequence[int], max_seqlen: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if torch.float64 in (x.dtype, metric.dtype, size.dtype):  # the kernels add up in fp32
        return token_merge_reference(x, metric, size, cu_seqlens, removed, max_seqlen, protected)
    if max_seqlen * (len(removed) - 1) >= 1 << 31:
        raise ValueError(f"fastmllm::token_merge: max_seqlen {max_seqlen} x {len(removed) - 1} segments are more than "
                         "the 2^31 - 1 programs of a launch: merge fewer images at once")  # fmt: skip
    cu_seqlens = cu_seqlens.contiguous()
    best, partner = match_triton(metric, cu_seqlens, max_seqlen, protected)
    plan = plan_triton(best, partner, cu_seqlens, upload(tuple(removed), x.device), max_seqlen, protected)
    return *merge_triton(x, size, cu_seqlens, plan, max_seqlen, x.shape[0] - removed[-1]), plan[0]


def token_merge_bwd_triton(grad: Tensor, size: Tensor, new_size: Tensor, destination: Tensor) -> Tensor:
    if torch.float64 in (grad.dtype, size.dtype):
        return token_merge_bwd_reference(grad, size, new_size, destination)
    grad, size, new_size = grad.contiguous(), size.contiguous(), new_size.contiguous()
    tokens, width = size.shape[0], grad.shape[1]
    dx = grad.new_empty((tokens, width))
    config = _config("backward", width)
    if dx.numel():
        with device_of(grad):
            _bwd_kernel[(cdiv(tokens, config["BLOCK_N"]), cdiv(width, config["BLOCK_D"]))](
                grad, size, new_size, destination.contiguous(), dx, tokens, grad.shape[0], width, **config
            )
    return dx


# 4. operator ----------------------------------------------------------------------------------------------------------
_token_merge = torch.library.custom_op(
    "fastmllm::token_merge",
    token_merge_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor metric, Tensor size, Tensor cu_seqlens, int[] removed, SymInt max_seqlen, int protected)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
_token_merge.register_kernel("cuda")(token_merge_triton)

_token_merge_bwd = torch.library.custom_op(
    "fastmllm::token_merge_bwd",
    token_merge_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor size, Tensor new_size, Tensor destination) -> Tensor",
)
_token_merge_bwd.register_kernel("cuda")(token_merge_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_token_merge.register_fake
def _(x, metric, size, cu_seqlens, removed, max_seqlen, protected):
    kept = x.shape[0] - removed[-1]
    new_size = size.new_empty(kept)
    destination = x.new_empty(x.shape[0], dtype=torch.int64)
    return x.new_empty(kept, x.shape[1]), new_size, torch.empty_like(new_size), destination


@_token_merge_bwd.register_fake
def _(grad, size, new_size, destination):
    return grad.new_empty(size.shape[0], grad.shape[1])


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    _, new_size, log_size, destination = output
    ctx.save_for_backward(inputs[2], new_size, destination)
    ctx.mark_non_differentiable(new_size, log_size, destination)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_size, _grad_log_size, _grad_destination):
    dx = None if grad is None else _token_merge_bwd(grad.contiguous(), *ctx.saved_tensors)
    return dx, *[None] * 6


_token_merge.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
class MergedTokens(NamedTuple):
    """What is left: tokens, their sizes, the logarithms of those, the new boundaries, and where each token went."""

    tokens: Tensor
    size: Tensor
    log_size: Tensor
    cu_seqlens: Tensor
    destination: Tensor


def token_merge(
    x: Tensor,
    metric: Tensor,
    size: Tensor | None,
    r: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    protected: int = 0,
) -> MergedTokens:
    """Merge the `r` most similar pairs of tokens of every image.

    Args:
        x: (I, N, D) tokens, or (T, D) of all images, packed.
        metric: (I, N, M) or (T, M) what similarity is measured on, e.g. attention keys; no gradient flows through it.
        size: (I, N) or (T,) float, how many patches each token stands for; None = 1 each.
        r: pairs to merge in every image, or, on the host, in each of them: at most half of its unprotected tokens. For
            packed images on a GPU the caller answers for that, the host does not know their lengths.
        cu_seqlens: (S + 1,) int32 boundaries of the packed images, from 0 to T.
        max_seqlen: tokens of the longest image, or an upper bound. None reads it off `cu_seqlens`, which makes the host
            wait for a GPU.
        protected: tokens at the start of every image that neither merge nor are merged into: CLS, registers.

    Returns:
        MergedTokens: tokens (I, N - r, D) or (T', D), each the size-weighted mean of what it stands for, in the order
        of the input (a merged pair stands at its odd member's place); their size and log_size, the additive bias per
        key of proportional attention; cu_seqlens (S + 1,) of the packed result; destination (I, N) or (T,) int64, the
        row of the packed result that each token went to. A batch comes back packed if its images differ in r.

    Raises:
        ValueError: shapes do not fit, or r is out of range.

    Token Merging (Bolya et al., arXiv 2210.09461), Algorithm of Appendix D; protected=1 is its class token.
    """
    _check(x, metric, size, cu_seqlens)
    if size is None:
        size = x.new_ones(x.shape[:-1], dtype=accumulator_dtype(x.dtype))
    if cu_seqlens is None:
        segments, max_seqlen = x.shape[0], x.shape[1]
    else:
        segments = cu_seqlens.numel() - 1
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max()) if segments else 0
    counts = [r] * max(segments, 1) if isinstance(r, int) else [int(value) for value in r]
    lengths = [max_seqlen] * len(counts)
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = _lengths(cu_seqlens, x.shape[0], max_seqlen) or lengths
    for length, count in zip(lengths, counts, strict=False):
        if not 0 <= count <= max(length - protected, 0) // 2:
            raise ValueError(f"fastmllm::token_merge: r {count} must lie in 0..{max(length - protected, 0) // 2} for "
                             f"{length} tokens, {protected} of them protected")  # fmt: skip
    if len(counts) != max(segments, 1) and len(counts) != segments:
        raise ValueError(f"fastmllm::token_merge: r has {len(counts)} numbers for {segments} images")
    removed = [0]
    for count in counts[:segments]:
        removed.append(removed[-1] + count)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(segments + 1, dtype=torch.int32, device=x.device) * max_seqlen
    tokens, new_size, log_size, destination = _token_merge(
        x.flatten(0, -2), metric.detach().flatten(0, -2), size.detach().flatten(), cu_seqlens, removed, max_seqlen,
        protected,
    )  # fmt: skip
    if isinstance(r, int):
        left = torch.arange(segments + 1, dtype=torch.int32, device=x.device) * -r + cu_seqlens
    else:
        left = cu_seqlens - torch.tensor(removed, dtype=torch.int32).to(x.device, non_blocking=True)
    if x.dim() == 3 and len(set(counts)) == 1:
        shape = (x.shape[0], x.shape[1] - counts[0])
        tokens, new_size, log_size = tokens.view(*shape, x.shape[2]), new_size.view(shape), log_size.view(shape)
    return MergedTokens(tokens, new_size, log_size, left, destination.view(x.shape[:-1]))


def _lengths(cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> list[int]:
    starts = cu_seqlens.tolist()
    lengths = [last - first for first, last in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != tokens or any(not 0 <= length <= max_seqlen for length in lengths):
        raise ValueError(f"fastmllm::token_merge: cu_seqlens {starts} must rise from 0 to the {tokens} tokens of x in "
                         f"steps of at most max_seqlen {max_seqlen}")  # fmt: skip
    return lengths


def _check(x: Tensor, metric: Tensor, size: Tensor | None, cu_seqlens: Tensor | None) -> None:
    dims = 3 if cu_seqlens is None else 2
    if x.dim() != dims or metric.dim() != dims or x.shape[:-1] != metric.shape[:-1]:
        raise ValueError(
            f"fastmllm::token_merge: x {tuple(x.shape)}, metric {tuple(metric.shape)} must be (I, N, D) and (I, N, M), "
            "or with cu_seqlens (T, D) and (T, M)"
        )
    if size is not None and (size.shape != x.shape[:-1] or not size.is_floating_point()):
        raise ValueError(
            f"fastmllm::token_merge: size {tuple(size.shape)} {size.dtype} must be float {tuple(x.shape[:-1])}"
        )
    if cu_seqlens is not None and (
        cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype != torch.int32
        or cu_seqlens.device != x.device
    ):  # fmt: skip
        raise ValueError(f"fastmllm::token_merge: cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on "
                         f"{cu_seqlens.device} must be (S + 1,) int32 on {x.device}")  # fmt: skip
