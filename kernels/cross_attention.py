"""Cross-attention from text rows to media tokens: each row sees one range of keys (Flamingo, arXiv 2204.14198).

Shapes: T text rows, N media tokens of all images packed, H query heads, Hkv key/value heads (Hkv divides H), D head
dimension. Row t sees the keys media_start[t] to media_stop[t] - 1 of the packed N; an empty range gives zeros, as in
OpenFlamingo and Idefics (and unlike transformers' Mllama, where such a row averages over the image).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._dense import dense_bwd, dense_fwd, rows_contiguous
from ._tiles import load_lse, load_tile, softmax_end, softmax_step, store_tile
from ._triton import accumulator_dtype, cdiv, device_of, dot, next_power_of_2, tl, triton

MAX_HEAD_DIM = 128
SCAN = 1024  # rows whose ranges the kernel of dk and dv looks at in one step


# 1. reference ---------------------------------------------------------------------------------------------------------
def _groups(media_start: Tensor, media_stop: Tensor, num_keys: int) -> list[tuple[slice, slice]]:
    """Return neighbouring rows that see the same keys, with these keys: one dense call each, without a mask.

    With one range an image that skips all keys of other images; a mask of (T, N) would compute them.
    """
    groups, first, previous = [], 0, None
    ranges = zip(media_start.clamp(min=0).tolist(), media_stop.clamp(max=num_keys).tolist(), strict=True)
    for row, keys in enumerate(ranges):
        if keys != previous:
            if previous is not None and previous[0] < previous[1]:
                groups.append((slice(first, row), slice(*previous)))
            first, previous = row, keys
    if previous is not None and previous[0] < previous[1]:
        groups.append((slice(first, media_start.numel()), slice(*previous)))
    return groups


def _dense(t: Tensor, rows: slice) -> Tensor:
    return t[rows].transpose(0, 1)[None]  # (1, H, L, D)


def cross_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, media_start: Tensor, media_stop: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=accumulator_dtype(q.dtype))
    for rows, keys in _groups(media_start, media_stop, k.shape[0]):
        o, one = dense_fwd(_dense(q, rows), _dense(k, keys), _dense(v, keys), False, None, softmax_scale)
        _dense(out, rows).copy_(o)
        lse[:, rows] = one[0]
    return out, lse


def cross_attention_bwd_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, media_start: Tensor, media_stop: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, grad, out = (rows_contiguous(t) for t in (q, k, v, grad, out))
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    # several groups may see one key
    dk, dv = (torch.zeros(t.shape, dtype=accumulator_dtype(t.dtype), device=t.device) for t in (k, v))
    for rows, keys in _groups(media_start, media_stop, k.shape[0]):
        dense = (_dense(grad, rows), _dense(q, rows), _dense(k, keys), _dense(v, keys), _dense(out, rows))
        grads = dense_bwd(*dense, lse[:, rows][None], False, None, softmax_scale)
        _dense(dq, rows).copy_(grads[0])
        _dense(dk, keys).add_(grads[1])
        _dense(dv, keys).add_(grads[2])
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
# One program owns one block of rows (or of keys) of one head, and visits only what the ranges of its rows touch.
# Where all rows of a block see the same keys - the rule, as texts are longer than a block - whole key blocks need no
# mask. `scale2` is the scale times log2(e).
@triton.jit
def _ranges(start_ptr, stop_ptr, rows, T, N):
    """Return the keys of each row; an empty range is (N, 0), so that minima and maxima pass over it."""
    low = tl.maximum(tl.load(start_ptr + rows, mask=rows < T, other=0), 0)
    high = tl.minimum(tl.load(stop_ptr + rows, mask=rows < T, other=0), N)
    empty = low >= high
    return tl.where(empty, N, low), tl.where(empty, 0, high)


@triton.jit
def _key_range(low, high, BLOCK_N: tl.constexpr):
    """Return the first key that a block of rows touches, where masks start, and where it ends."""
    first, end = tl.min(low, 0), tl.max(high, 0)
    same = (tl.max(low, 0) == first) & (tl.min(high, 0) == end)
    return first, tl.where(same, first + tl.maximum(end - first, 0) // BLOCK_N * BLOCK_N, first), end


@triton.jit
def _seen(cols, low, high):
    """Tell whether low <= cols < high, in one unsigned comparison; low and high are broadcast against cols."""
    return (cols - low).to(tl.uint32, bitcast=True) < tl.maximum(high - low, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _scores(q, k, cols, low, high, scale2, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    s = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32)) * scale2
    if MASKED:
        s = tl.where(_seen(cols[None, :], low[:, None], high[:, None]), s, float("-inf"))
    return s


@triton.jit(do_not_specialize=["T", "N"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, out_ptr, lse_ptr, T, N, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    rows = tl.program_id(0) // HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    low, high = _ranges(start_ptr, stop_ptr, rows, T, N)
    first, masked, end = _key_range(low, high, BLOCK_N)
    q = load_tile(q_ptr + head * Q_HEAD, rows, T, Q_ROW, D, BLOCK_D, True)
    k_ptr += head // GROUP * K_HEAD
    v_ptr += head // GROUP * V_HEAD
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for TAIL in tl.static_range(2):
        for start in range(masked if TAIL else first, end if TAIL else masked, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            near = tl.minimum(cols, N - 1) if TAIL else cols  # the mask of the scores drops what is repeated
            k = load_tile(k_ptr, near, N, K_ROW, D, BLOCK_D, False)
            s = _scores(q, k, cols, low, high, scale * 1.4426950408889634, TAIL == 1, BLOCK_N)
            v = load_tile(v_ptr, near, N, V_ROW, D, BLOCK_D, False)
            acc, peak, total = softmax_step(acc, peak, total, s, v)
    out, lse = softmax_end(acc, peak, total)
    store_tile(out_ptr + head * D, out, rows, T, HEADS * D, D, BLOCK_D)
    tl.store(lse_ptr + head * T + rows, lse, mask=rows < T)


@triton.jit(do_not_specialize=["T", "N"])
def _dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, out_ptr, lse_ptr, lse2_ptr, delta_ptr, dq_ptr, T, N, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Give dq, and for the kernel of dk and dv delta = sum(do * out) and log-sum-exp in powers of two."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    rows = tl.program_id(0) // HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    low, high = _ranges(start_ptr, stop_ptr, rows, T, N)
    first, masked, end = _key_range(low, high, BLOCK_N)
    do = load_tile(do_ptr + head * D, rows, T, HEADS * D, D, BLOCK_D, True)
    out = load_tile(out_ptr + head * D, rows, T, HEADS * D, D, BLOCK_D, True)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    lse = load_lse(lse_ptr + head * T, rows, T)
    tl.store(delta_ptr + head * T + rows, delta, mask=rows < T)
    tl.store(lse2_ptr + head * T + rows, lse, mask=rows < T)
    q = load_tile(q_ptr + head * Q_HEAD, rows, T, Q_ROW, D, BLOCK_D, True)
    k_ptr += head // GROUP * K_HEAD
    v_ptr += head // GROUP * V_HEAD
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for TAIL in tl.static_range(2):
        for start in range(masked if TAIL else first, end if TAIL else masked, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            near = tl.minimum(cols, N - 1) if TAIL else cols  # the mask of the scores drops what is repeated
            k = load_tile(k_ptr, near, N, K_ROW, D, BLOCK_D, False)
            v = load_tile(v_ptr, near, N, V_ROW, D, BLOCK_D, False)
            s = _scores(q, k, cols, low, high, scale * 1.4426950408889634, TAIL == 1, BLOCK_N)
            ds = tl.exp2(s - lse[:, None]) * (dot(do, tl.trans(v), zeros) - delta[:, None])
            dq = dot(ds.to(k.dtype), k, dq)
    store_tile(dq_ptr + head * D, dq * scale, rows, T, HEADS * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "N"])
def _dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, T, N, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCAN_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Give dk and dv of one block of keys: find the rows that see it, then walk them, so nothing is atomic."""
    head = (tl.program_id(0) % (HEADS // GROUP)).to(tl.int64)
    first = tl.program_id(0) // (HEADS // GROUP) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    earliest = tl.full((SCAN_ROWS,), 2147483647, tl.int32)
    latest = tl.zeros((SCAN_ROWS,), tl.int32)
    for start in range(0, T, SCAN_ROWS):
        rows = start + tl.arange(0, SCAN_ROWS)
        low, high = _ranges(start_ptr, stop_ptr, rows, T, N)
        sees = (low < first + BLOCK_N) & (high > first)
        earliest = tl.minimum(earliest, tl.where(sees, rows, 2147483647))
        latest = tl.maximum(latest, tl.where(sees, rows + 1, 0))
    k = load_tile(k_ptr + head * K_HEAD, cols, N, K_ROW, D, BLOCK_D, True)
    v = load_tile(v_ptr + head * V_HEAD, cols, N, V_ROW, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    end = tl.max(latest, 0)
    begin = tl.minimum(tl.min(earliest, 0), end)
    for h in range(GROUP):
        one = head * GROUP + h
        for start in range(begin, end, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            low, high = _ranges(start_ptr, stop_ptr, rows, T, N)
            near = tl.minimum(rows, T - 1)  # rows behind the end see nothing, whatever they repeat
            q = load_tile(q_ptr + one * Q_HEAD, near, T, Q_ROW, D, BLOCK_D, False)
            do = load_tile(do_ptr + one * D, near, T, HEADS * D, D, BLOCK_D, False)
            lse = tl.load(lse2_ptr + one * T + near)
            delta = tl.load(delta_ptr + one * T + near)
            s = dot(k, tl.trans(q), zeros) * (scale * 1.4426950408889634) - lse[None, :]  # (BLOCK_N, BLOCK_M)
            s = tl.where(_seen(cols[:, None], low[None, :], high[None, :]), s, float("-inf"))
            p = tl.exp2(s)
            dv = dot(p.to(do.dtype), do, dv)
            ds = p * (dot(v, tl.trans(do), zeros) - delta[None, :])
            dk = dot(ds.to(q.dtype), q, dk)
    stride = HEADS // GROUP * D
    store_tile(dk_ptr + head * D, dk * scale, cols, N, stride, D, BLOCK_D)
    store_tile(dv_ptr + head * D, dv, cols, N, stride, D, BLOCK_D)


# 3. launchers ---------------------------------------------------------------------------------------------------------
# Head dimension, padded -> (BLOCK_M, BLOCK_N, num_warps, num_stages) of forward, dq, and dk with dv, in 16 bits. These
# do not spill on sm_80, sm_90, sm_100 and gfx942.
_TILES = {
    16: ((128, 32, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2)),
    32: ((128, 32, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2)),
    64: ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    128: ((64, 32, 4, 3), (64, 32, 4, 2), (16, 64, 8, 2)),
}


def _config(kind: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of the forward (0), dq (1) or dk and dv (2) kernel; fp32 has no tensor cores here: small ones."""
    block_d = max(16, next_power_of_2(head_dim))
    m, n, warps, stages = (32, 32, 4, 1) if dtype == torch.float32 else _TILES[block_d][kind]
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


def _constants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Return what a model fixes; strides among it, so that the compiler sees how wide it may load."""
    names = ("Q_ROW", "Q_HEAD", "K_ROW", "K_HEAD", "V_ROW", "V_HEAD")
    strides = dict(zip(names, (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]), strict=True))
    return {**strides, "HEADS": q.shape[1], "GROUP": q.shape[1] // k.shape[1], "D": q.shape[2]}


def _prepare(q: Tensor, k: Tensor, v: Tensor, media_start: Tensor, media_stop: Tensor) -> tuple[Tensor, ...]:
    if q.dtype == torch.float64:
        raise ValueError("fastmllm::cross_attention: the Triton kernels compute in float32; move float64 tensors to "
                         "the CPU")  # fmt: skip
    return (*(rows_contiguous(t) for t in (q, k, v)), media_start.contiguous(), media_stop.contiguous())


def cross_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, media_start: Tensor, media_stop: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v, *ranges = _prepare(q, k, v, media_start, media_stop)
    total, heads, d = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((heads, total), dtype=torch.float32)
    config = _config(0, d, q.dtype)
    if total:
        with device_of(q):
            _fwd_kernel[(cdiv(total, config["BLOCK_M"]) * heads,)](
                q, k, v, *ranges, out, lse, total, k.shape[0], softmax_scale, **_constants(q, k, v), **config
            )
    return out, lse


def cross_attention_bwd_triton(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, media_start: Tensor, media_stop: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, *ranges = _prepare(q, k, v, media_start, media_stop)
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    total, heads, d = q.shape
    keys, heads_k = k.shape[:2]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    constants = _constants(q, k, v)
    with device_of(q):
        config = _config(1, d, q.dtype)
        if total:
            _dq_kernel[(cdiv(total, config["BLOCK_M"]) * heads,)](
                grad, q, k, v, *ranges, out, lse, lse2, delta, dq, total, keys, softmax_scale, **constants, **config
            )
        config = _config(2, d, q.dtype)
        if keys:
            _dkv_kernel[(cdiv(keys, config["BLOCK_N"]) * heads_k,)](
                grad, q, k, v, *ranges, lse2, delta, dk, dv, total, keys, softmax_scale, SCAN_ROWS=SCAN, **constants,
                **config,
            )  # fmt: skip
    return dq, dk, dv


# 4. operator ----------------------------------------------------------------------------------------------------------
_cross_attention = torch.library.custom_op(
    "fastmllm::cross_attention",
    cross_attention_reference,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor media_start, Tensor media_stop, float softmax_scale)"
    " -> (Tensor, Tensor)",
)
_cross_attention.register_kernel("cuda")(cross_attention_triton)

_cross_attention_bwd = torch.library.custom_op(
    "fastmllm::cross_attention_bwd",
    cross_attention_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor media_start, Tensor media_stop,"
    " float softmax_scale) -> (Tensor, Tensor, Tensor)",
)
_cross_attention_bwd.register_kernel("cuda")(cross_attention_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_cross_attention.register_fake
def _(q, k, v, media_start, media_stop, softmax_scale):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=accumulator_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@_cross_attention_bwd.register_fake
def _(grad, q, k, v, out, lse, media_start, media_stop, softmax_scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    q, k, v, media_start, media_stop, ctx.softmax_scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, media_start, media_stop)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    if grad is None:
        return (None,) * 6
    return *_cross_attention_bwd(grad.contiguous(), *ctx.saved_tensors, ctx.softmax_scale), None, None, None


_cross_attention.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, media_start: Tensor, media_stop: Tensor, softmax_scale: float | None = None
) -> Tensor:
    """Let each text row attend to its own range of media tokens.

    Args:
        q: (T, H, D) queries of all samples, packed.
        k: (N, Hkv, D) keys of all media, packed; Hkv divides H, and query head h reads key head h // (H / Hkv).
        v: (N, Hkv, D) values.
        media_start: (T,) int32, the first key that a row sees, counted in the packed N; `media_ranges` makes it.
        media_stop: (T,) int32, the key behind the last one that it sees. Rows with start >= stop see none.
        softmax_scale: multiplies q k^T; None for D ** -0.5.

    Returns:
        (T, H, D) in the dtype of `q`; a row that sees no key is zero and passes no gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    The masked cross-attention of OpenFlamingo and Idefics; CogAgent and Llama-3.2-Vision are ranges over all keys.
    """
    if (
        q.dim() != 3
        or k.dim() != 3
        or k.shape != v.shape
        or q.shape[2] != k.shape[2]
        or not k.shape[1]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"fastmllm::cross_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be "
            "(T, H, D), (N, Hkv, D) and (N, Hkv, D) with Hkv dividing H"
        )
    if not 0 < q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"fastmllm::cross_attention: head dimension {q.shape[2]} of q {tuple(q.shape)} is not 1 to "
                         f"{MAX_HEAD_DIM}")  # fmt: skip
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"fastmllm::cross_attention: q {q.dtype}, k {k.dtype} and v {v.dtype} must be one floating "
                         "dtype")  # fmt: skip
    for name, t in (("media_start", media_start), ("media_stop", media_stop)):
        if t.shape != q.shape[:1] or t.dtype != torch.int32 or t.device != q.device:
            raise ValueError(f"fastmllm::cross_attention: {name} {tuple(t.shape)} {t.dtype} on {t.device} must be "
                             f"({q.shape[0]},) int32 on {q.device}, one entry a row of q {tuple(q.shape)}")  # fmt: skip
    if softmax_scale is None:
        softmax_scale = q.shape[2] ** -0.5
    return _cross_attention(q, k, v, media_start, media_stop, softmax_scale)[0]


def media_ranges(
    is_media: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, policy: str = "latest"
) -> tuple[Tensor, Tensor]:
    """Return which keys each text row of a packed batch sees; the host does not wait for the device.

    Args:
        is_media: (T,) bool, true on the one row of each image (its placeholder token); that row sees its image too.
        cu_seqlens_q: (S + 1,) int32 boundaries of the samples in the T rows.
        cu_seqlens_k: (I + 1,) int32 boundaries of the images in the packed keys, in the order of their rows.
        policy: "latest", only the image last introduced in the same sample (Flamingo's text_time == media_time), or
            "all_previous", every image introduced in it so far (>=).

    Returns:
        media_start and media_stop, (T,) int32; rows before the first image of their sample get an empty range.

    Raises:
        ValueError: the policy is unknown, a tensor has another shape or dtype, or (on a CPU, where the check is free)
            the marked rows are not as many as the images.

    The masks of OpenFlamingo's `only_attend_immediate_media`, as ranges.
    """
    if policy not in ("latest", "all_previous"):
        raise ValueError(f'fastmllm::media_ranges: policy {policy!r} must be "latest" or "all_previous"')
    if is_media.dim() != 1 or is_media.dtype != torch.bool or cu_seqlens_q.dim() != 1 or cu_seqlens_k.dim() != 1:
        raise ValueError(
            f"fastmllm::media_ranges: is_media {tuple(is_media.shape)} {is_media.dtype}, cu_seqlens_q "
            f"{tuple(cu_seqlens_q.shape)} and cu_seqlens_k {tuple(cu_seqlens_k.shape)} must be (T,) bool, (S + 1,) "
            "and (I + 1,)"
        )
    num_media = cu_seqlens_k.numel() - 1
    if is_media.is_cpu and not torch.compiler.is_compiling() and int(is_media.sum()) != num_media:
        raise ValueError(f"fastmllm::media_ranges: is_media {tuple(is_media.shape)} marks {int(is_media.sum())} rows, "
                         f"but cu_seqlens_k {tuple(cu_seqlens_k.shape)} bounds {num_media} images")  # fmt: skip
    seen = is_media.cumsum(0)  # (T,) images introduced up to and including a row, in all samples
    before = torch.cat([seen.new_zeros(1), seen])  # (T + 1,) ... before a row
    rows = torch.arange(is_media.numel(), device=is_media.device)
    sample = torch.searchsorted(cu_seqlens_q[1:].long(), rows, right=True)
    first = before[cu_seqlens_q.long()[sample]]  # (T,) the first image of a row's sample
    last_image = seen - 1 if policy == "latest" else first
    none = seen == first
    bounds = cu_seqlens_k.to(torch.int32)
    start, stop = (bounds[t.clamp(min=0, max=num_media)] for t in (last_image, seen))
    return start.masked_fill(none, 0), stop.masked_fill(none, 0)
