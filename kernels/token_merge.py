"""Token merging: bipartite soft matching and a size-weighted merge (ToMe, Bolya et al., arXiv 2210.09461).

Shapes: I images, N tokens, D width, M metric width, R merged tokens. Tokens at even places (A) look for their most
similar token at an odd place (B) by cosine; the R best pairs are merged. The N x N similarity is never stored, the
merge is deterministic, and the tokens keep their order. The plan is `destination` (I, N): where each token went.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native  # noqa: F401 - its C++ implementation registers itself
from ._triton import accumulator_dtype, cdiv, device_of, dot, next_power_of_2, tl, triton

CHUNK = 256  # rows of similarity that the reference holds at once


# 1. reference ---------------------------------------------------------------------------------------------------------
def token_merge_reference(x: Tensor, metric: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    best, index = _match_reference(metric)
    destination = _plan(best, index, x.shape[1], r)
    merged, new_size = _merge_reference(x, size, destination, r)
    return merged, new_size, destination


def _match_reference(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each even token its largest cosine (I, |A|) with an odd token, and which odd token that is."""
    unit = torch.nn.functional.normalize(metric.to(accumulator_dtype(metric.dtype)), dim=-1, eps=1e-12)
    a, b = unit[:, ::2], unit[:, 1::2].transpose(1, 2)
    parts = [torch.bmm(a[:, i : i + CHUNK], b).max(-1) for i in range(0, a.shape[1], CHUNK)]
    return torch.cat([p.values for p in parts], 1), torch.cat([p.indices for p in parts], 1)


def _plan(best: Tensor, index: Tensor, n: int, r: int) -> Tensor:
    """Turn matches into destinations (I, N) int64, on the device; of equally similar pairs the earlier one merges."""
    chosen = best.sort(dim=1, descending=True, stable=True).indices[:, :r]
    merged = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
    place = torch.stack([~merged, torch.ones_like(merged)], 2).flatten(1).cumsum(1) - 1  # (I, 2 |A|)
    into = place.gather(1, 2 * index + 1)
    # for odd N the last, absent odd token is cut off
    return torch.stack([torch.where(merged, into, place[:, ::2]), place[:, 1::2]], 2).flatten(1)[:, :n].contiguous()


def _merge_reference(x: Tensor, size: Tensor, destination: Tensor, r: int) -> tuple[Tensor, Tensor]:
    images, n, width = x.shape
    wide = size.to(accumulator_dtype(x.dtype))
    new_size = wide.new_zeros(images, n - r).scatter_add_(1, destination, wide)
    sums = wide.new_zeros(images, n - r, width)
    sums.scatter_add_(1, destination.unsqueeze(-1).expand(-1, -1, width), x.to(wide.dtype) * wide.unsqueeze(-1))
    return (sums / new_size.unsqueeze(-1)).to(x.dtype), new_size.to(size.dtype)


def token_merge_bwd_reference(grad: Tensor, size: Tensor, new_size: Tensor, destination: Tensor) -> Tensor:
    share = size / new_size.gather(1, destination)  # (I, N)
    rows = grad.gather(1, destination.unsqueeze(-1).expand(-1, -1, grad.shape[-1]))
    return (rows.to(share.dtype) * share.unsqueeze(-1)).to(grad.dtype)


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _match_kernel(
    metric_ptr, best_ptr, index_ptr, N, M, NUM_A,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A block of even tokens walks over all odd tokens and keeps a running maximum; norms come from the same loads."""
    image = tl.program_id(1).to(tl.int64)
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    rows = metric_ptr + image * N * M
    # int64 up to the block, int32 inside it: tiles of int64 offsets spill
    left_ptr = rows + tl.program_id(0).to(tl.int64) * (2 * BLOCK_A) * M
    right_ptr = rows + M
    even_a = 2 * tl.arange(0, BLOCK_A) * M
    even_b = 2 * tl.arange(0, BLOCK_B) * M
    num_b = N // 2
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
                left_ptr + even_a[:, None] + m[None, :], mask=(a < NUM_A)[:, None] & (m < M)[None, :], other=0.0
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
        cosine = tl.where((b < num_b)[None, :], cosine, float("-inf"))
        value, where = tl.max(cosine, 1, return_indices=True)
        index = tl.where(value > best, start + where, index)
        best = tl.maximum(value, best)
        right_ptr += 2 * BLOCK_B * M
    tl.store(best_ptr + image * NUM_A + a, best, mask=a < NUM_A)
    tl.store(index_ptr + image * NUM_A + a, index, mask=a < NUM_A)


@triton.jit
def _fwd_kernel(
    x_ptr, size_ptr, order_ptr, start_ptr, y_ptr, new_size_ptr, N, K, D, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One output token adds up its sources in their order: no atomics."""
    image = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    weight = 0.0
    first = tl.load(start_ptr + image * (K + 1) + out)
    last = tl.load(start_ptr + image * (K + 1) + out + 1)
    for i in range(first, last):
        token = tl.load(order_ptr + image * N + i)
        size = tl.load(size_ptr + image * N + token).to(tl.float32)
        total += size * tl.load(x_ptr + (image * N + token) * D + d, mask=d < D, other=0.0).to(tl.float32)
        weight += size
    tl.store(y_ptr + (image * K + out) * D + d, (total / weight).to(y_ptr.dtype.element_ty), mask=d < D)
    if tl.program_id(2) == 0:
        tl.store(new_size_ptr + image * K + out, weight)


@triton.jit
def _bwd_kernel(
    dy_ptr, size_ptr, new_size_ptr, destination_ptr, dx_ptr, N, K, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    to = tl.load(destination_ptr + image * N + n, mask=n < N, other=0)
    share = tl.load(size_ptr + image * N + n, mask=n < N, other=0.0).to(tl.float32) / tl.load(
        new_size_ptr + image * K + to, mask=n < N, other=1.0
    ).to(tl.float32)
    mask = (n < N)[:, None] & (d < D)[None, :]
    dy = tl.load(dy_ptr + (image * K + to)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + (image * N + n)[:, None] * D + d[None, :], (dy * share[:, None]).to(dx_ptr.dtype.element_ty),
             mask=mask)  # fmt: skip


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(kernel: str, width: int) -> dict[str, int]:
    """Return the tile of the "match", "forward" or "backward" kernel: none spills on a target."""
    block = next_power_of_2(width)
    if kernel == "match":  # pairs, and the channels of one product
        return {"BLOCK_A": 64, "BLOCK_B": 64, "BLOCK_M": max(16, min(64, block)), "num_warps": 8}
    if kernel == "forward":
        return {"BLOCK_D": min(1024, block), "num_warps": 4}
    block = min(256, block)
    return {"BLOCK_N": 2048 // block, "BLOCK_D": block, "num_warps": 4}


def match_triton(metric: Tensor) -> tuple[Tensor, Tensor]:
    metric = metric.contiguous()
    images, n, width = metric.shape
    num_a = cdiv(n, 2)
    best = metric.new_empty((images, num_a), dtype=torch.float32)
    index = metric.new_empty((images, num_a), dtype=torch.int32)
    config = _config("match", width)
    if images and n > 1:
        with device_of(metric):
            _match_kernel[(cdiv(num_a, config["BLOCK_A"]), images)](metric, best, index, n, width, num_a, **config)
    return best, index


def token_merge_triton(x: Tensor, metric: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    if torch.float64 in (x.dtype, metric.dtype, size.dtype):  # the kernels add up in fp32
        return token_merge_reference(x, metric, size, r)
    best, index = match_triton(metric)
    destination = _plan(best, index.long(), x.shape[1], r)
    merged, new_size = merge_triton(x, size, destination, r)
    return merged, new_size, destination


def merge_triton(x: Tensor, size: Tensor, destination: Tensor, r: int) -> tuple[Tensor, Tensor]:
    x, size = x.contiguous(), size.contiguous()
    images, n, width = x.shape
    kept = n - r
    order = destination.sort(dim=1, stable=True).indices.contiguous()  # sources, grouped by where they go
    counts = torch.zeros((images, kept + 1), dtype=torch.int64, device=x.device)
    start = counts.scatter_add_(1, destination + 1, torch.ones_like(destination)).cumsum(1)
    merged = x.new_empty((images, kept, width))
    new_size = torch.empty_like(size[:, :kept], memory_format=torch.contiguous_format)
    config = _config("forward", width)
    if images and kept:
        with device_of(x):
            _fwd_kernel[(kept, images, cdiv(width, config["BLOCK_D"]))](
                x, size, order, start, merged, new_size, n, kept, width, **config
            )
    return merged, new_size


def token_merge_bwd_triton(grad: Tensor, size: Tensor, new_size: Tensor, destination: Tensor) -> Tensor:
    if torch.float64 in (grad.dtype, size.dtype):
        return token_merge_bwd_reference(grad, size, new_size, destination)
    grad, size, new_size = grad.contiguous(), size.contiguous(), new_size.contiguous()
    destination = destination.contiguous()
    images, kept, width = grad.shape
    n = size.shape[1]
    dx = grad.new_empty((images, n, width))
    config = _config("backward", width)
    if dx.numel():
        with device_of(grad):
            _bwd_kernel[(cdiv(n, config["BLOCK_N"]), images, cdiv(width, config["BLOCK_D"]))](
                grad, size, new_size, destination, dx, n, kept, width, **config
            )
    return dx


# 4. operator ----------------------------------------------------------------------------------------------------------
_token_merge = torch.library.custom_op(
    "fastmllm::token_merge",
    token_merge_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor metric, Tensor size, int r) -> (Tensor, Tensor, Tensor)",
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
def _(x, metric, size, r):
    images, n, width = x.shape
    return (
        x.new_empty(images, n - r, width),
        size.new_empty(images, n - r),
        x.new_empty((images, n), dtype=torch.int64),
    )


@_token_merge_bwd.register_fake
def _(grad, size, new_size, destination):
    return grad.new_empty(grad.shape[0], size.shape[1], grad.shape[2])


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    _, new_size, destination = output
    ctx.save_for_backward(inputs[2], new_size, destination)
    ctx.mark_non_differentiable(new_size, destination)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_size, _grad_destination):
    if grad is None:
        return None, None, None, None
    return _token_merge_bwd(grad.contiguous(), *ctx.saved_tensors), None, None, None


_token_merge.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def token_merge(x: Tensor, metric: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor]:
    """Merge the `r` most similar pairs of tokens of every image.

    Args:
        x: (I, N, D) tokens.
        metric: (I, N, M) what similarity is measured on, e.g. attention keys; no gradient flows through it.
        size: (I, N) float, how many patches each token stands for; None = 1 each.
        r: pairs to merge, 0 <= r <= N // 2.

    Returns:
        tokens (I, N - r, D), each the size-weighted mean of what it stands for, in the order of the input (a
        merged pair stands at its odd member's place), and their sizes (I, N - r).

    Raises:
        ValueError: shapes do not fit, or r is out of range.

    Token Merging (Bolya et al., arXiv 2210.09461), Algorithm of Appendix D, without a class token.
    """
    if x.dim() != 3 or metric.dim() != 3 or x.shape[:2] != metric.shape[:2]:
        raise ValueError(
            f"fastmllm::token_merge: x {tuple(x.shape)}, metric {tuple(metric.shape)} must be (I, N, D) and (I, N, M)"
        )
    if size is None:
        size = x.new_ones(x.shape[:2], dtype=accumulator_dtype(x.dtype))
    if size.shape != x.shape[:2] or not size.is_floating_point():
        raise ValueError(
            f"fastmllm::token_merge: size {tuple(size.shape)} {size.dtype} must be float {tuple(x.shape[:2])}"
        )
    if not 0 <= r <= x.shape[1] // 2:
        raise ValueError(f"fastmllm::token_merge: r {r} must lie in 0..{x.shape[1] // 2} for {x.shape[1]} tokens")
    if r == 0:
        return x, size
    merged, new_size, _ = _token_merge(x, metric.detach(), size.detach(), r)
    return merged, new_size
