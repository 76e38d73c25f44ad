"""Cross entropy of a linear head that computes logits only for the rows it scores, and never all of them at once.

Shapes: T rows, n of them kept (label != ignore_index), width D, vocabulary V. In instruction tuning of multimodal
models most rows are image and prompt: the cost here is proportional to n, not to T. The log-sum-exp over the
vocabulary is taken online (Milakov and Gimelshein, arXiv 1805.02867); cf. Wijmans et al., arXiv 2411.09009. Weights,
divisors and the log-probabilities of sequences are arithmetic on the (T,) losses of the one operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import accumulator_dtype, cdiv, device_of, dot, next_power_of_2, tl, triton
from ._watch import report

CHUNK = 1 << 24  # logits held at once by the reference (64 MiB in fp32)
GRADIENT_CHUNK = 1 << 26  # d loss / d logits held at once by the Triton launcher (128 MiB in bf16)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32's finite numbers
SPLITS = 1056  # parts of the vocabulary in forward, where it has so many tiles: 8 programs an SM of the largest GPU


def _rows_without_sync(labels: Tensor, ignore_index: int, num_targets: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the n scored rows, and a scalar that is 1, or NaN where the host's count is wrong."""
    kept = labels != ignore_index
    rows = torch.nonzero_static(kept, size=num_targets, fill_value=0).view(-1)
    return rows, torch.where(kept.sum() == num_targets, 1.0, float("nan"))


def _kept_rows(labels: Tensor, vocabulary: int, ignore_index: int, num_targets: int | None) -> tuple[Tensor, Tensor]:
    """Return the indices of the n scored rows and a factor for the loss; wrong labels and counts raise.

    A GPU that is told n is not waited for: there they make the loss and the gradients NaN.
    """
    if labels.device.type != "cpu" and num_targets is not None:
        return _rows_without_sync(labels, ignore_index, num_targets)
    rows = (labels != ignore_index).nonzero().view(-1)
    if num_targets is not None and num_targets != rows.numel():
        raise ValueError(f"fastmllm::linear_cross_entropy: num_targets is {num_targets}, but {rows.numel()} of the "
                         f"labels {tuple(labels.shape)} differ from ignore_index {ignore_index}")  # fmt: skip
    if rows.numel():
        low, high = labels.index_select(0, rows).aminmax()
        if low < 0 or high >= vocabulary:
            raise ValueError(f"fastmllm::linear_cross_entropy: label {int(low if low < 0 else high)} is outside of the "
                             f"vocabulary [0, {vocabulary}) and is not ignore_index {ignore_index}: does the tokenizer "
                             "fit the model?")  # fmt: skip
    return rows, torch.ones((), device=labels.device)


def _targets(labels: Tensor, rows: Tensor, vocabulary: int, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels (R, 1) that can be gathered, and what is added to their row: NaN for a wrong one, else 0."""
    label = labels[rows].long().unsqueeze(1)
    target = label.clamp(0, vocabulary - 1)
    return target, torch.where(label == target, 0.0, float("nan")) + (valid - 1)


# 1. reference ---------------------------------------------------------------------------------------------------------
def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    num_targets: int | None,
    reduce: bool,
    hidden_grad: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, log-sum-exps, and what backward wants: with `hidden_grad` the gradient of the hidden states, with
    `keep` the gradient of the logits of the n scored rows where they are few, else nothing.
    """
    acc = accumulator_dtype(hidden.dtype)
    rows, valid = _kept_rows(labels, weight.shape[0], ignore_index, num_targets)
    loss = hidden.new_zeros(labels.shape, dtype=acc)
    lse = torch.zeros_like(loss)
    early = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if hidden_grad else hidden.new_empty(0)
    if keep:
        early = hidden.new_empty((0, weight.shape[0]))
    parts = rows.split(max(1, CHUNK // weight.shape[0]))
    for part in parts:
        target, wrong = _targets(labels, part, weight.shape[0], valid)
        logits = (hidden[part] @ weight.t()).to(acc)  # (R, V)
        picked = logits.gather(1, target) + wrong
        logits = logits.log_softmax(1)
        part_loss = wrong - logits.gather(1, target)
        loss[part], lse[part] = part_loss.squeeze(1).to(acc), (picked + part_loss).squeeze(1).to(acc)
        if hidden_grad or (keep and len(parts) == 1):  # of the sum of the losses: backward needs no second look
            logits.exp_().scatter_add_(1, target, (wrong - 1).to(acc))
            if hidden_grad:
                early[part] = logits.to(hidden.dtype) @ weight
            else:
                early = logits.to(hidden.dtype)
    if not rows.numel():
        early.mul_(valid)
    loss = loss * valid.to(acc)
    return loss.sum() if reduce else loss, lse * valid.to(acc), early


def linear_cross_entropy_bwd_reference(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    num_targets: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return both gradients; `kept` is what forward kept of the logits, or empty."""
    acc = accumulator_dtype(hidden.dtype)
    rows, valid = _kept_rows(labels, weight.shape[0], ignore_index, num_targets)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if hidden_grad else hidden.new_empty(0)
    parts = rows.split(max(1, CHUNK // weight.shape[0]))
    total = weight.new_zeros(weight.shape, dtype=acc) if weight_grad and len(parts) != 1 else None
    d_weight = weight.new_empty(0)
    for part in parts:
        target, wrong = _targets(labels, part, weight.shape[0], valid)
        h = hidden[part]
        if kept is not None and len(kept):
            p = kept
        else:
            p = (h @ weight.t()).to(acc).sub_(lse[part].unsqueeze(1)).exp_()
            p = p.scatter_add_(1, target, (wrong - 1).to(acc)).to(hidden.dtype)
        # the D columns of a row are scaled, not the V logits
        scale = (grad[part] if grad.dim() else grad.expand(part.shape)).to(acc).unsqueeze(1)
        if hidden_grad:
            d_hidden[part] = ((p @ weight) * scale).to(hidden.dtype)
        h = (h * scale).to(hidden.dtype)
        if total is not None:
            total = total.addmm_(p.t(), h) if acc == p.dtype else total.add_(p.t() @ h)
        elif weight_grad:
            d_weight = p.t() @ h
    if not rows.numel():
        d_hidden, d_weight = d_hidden.mul_(valid), d_weight.mul_(valid)
    return d_hidden, d_weight if total is None else total.to(weight.dtype)


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _logits(
    h_ptr, w_ptr, rows, cols, N, V, D,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return a (BLOCK_M, BLOCK_N) tile of hidden @ weight^T; rows and columns past the end repeat the last one."""
    ks = tl.arange(0, BLOCK_K)
    h_ptrs = h_ptr + tl.minimum(rows, N - 1)[:, None] * D + ks[None, :]
    w_ptrs = w_ptr + tl.minimum(cols, V - 1).to(tl.int64)[None, :] * D + ks[:, None]
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(h_ptrs), tl.load(w_ptrs)
        else:
            inside = start + ks < D
            a, b = tl.load(h_ptrs, mask=inside[None, :], other=0.0), tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        tile = dot(a, b, tile)
        h_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return tile


@triton.jit
def _add_exp(tile, axis: tl.constexpr, peak, total):
    """Go on with a running log-sum-exp, peak + log(total); it starts at LOWEST, because -inf - -inf is NaN."""
    higher = tl.maximum(peak, tl.max(tile, axis))
    return higher, total * tl.exp(peak - higher) + tl.sum(tl.exp(tile - tl.expand_dims(higher, axis)), axis)


@triton.jit
def _fwd_kernel(
    h_ptr, w_ptr, label_ptr, lse_ptr, target_ptr, N, V, D, TILES,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of some rows over TILES vocabulary tiles; the first share also gathers the label's logit.

    That is NaN for a label outside of the vocabulary.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1).to(tl.int64)
    if tl.program_id(1) == 0:
        label = tl.load(label_ptr + rows, mask=rows < N, other=-1).to(tl.int64)
        inside = (label >= 0) & (label < V)
        target = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, D, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            mask = inside[:, None] & (ks < D)[None, :]
            h = tl.load(h_ptr + rows[:, None] * D + ks[None, :], mask=mask, other=0.0).to(tl.float32)
            w = tl.load(w_ptr + label[:, None] * D + ks[None, :], mask=mask, other=0.0).to(tl.float32)
            target += tl.sum(h * w, 1)
        tl.store(target_ptr + rows, tl.where(inside, target, float("nan")), mask=rows < N)
    first = tl.program_id(1) * TILES * BLOCK_N
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, tl.minimum(first + TILES * BLOCK_N, V), BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        tile = _logits(h_ptr, w_ptr, rows, cols, N, V, D, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
        tile = tl.where((cols < V)[None, :], tile, float("-inf"))
        peak, total = _add_exp(tile, 1, peak, total)
    tl.store(lse_ptr + split * N + rows, peak + tl.log(total), mask=rows < N)


@triton.jit
def _join_kernel(part_ptr, target_ptr, lse_ptr, N, SPLITS, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """Log-sum-exp of the parts of each row, in an order that does not depend on how many rows there are.

    Where the label's logit is NaN, this is NaN, and with it the gradients.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    peak = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, SPLITS, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S).to(tl.int64)
        inside = (split < SPLITS)[:, None] & (rows < N)[None, :]
        part = tl.load(part_ptr + split[:, None] * N + rows[None, :], mask=inside, other=float("-inf"))
        peak, total = _add_exp(part, 0, peak, total)
    target = tl.load(target_ptr + rows, mask=rows < N, other=0.0)
    tl.store(lse_ptr + rows, tl.where(target == target, peak + tl.log(total), target), mask=rows < N)


@triton.jit
def _bwd_kernel(
    h_ptr, w_ptr, label_ptr, lse_ptr, grad_ptr, out_ptr, N, V, D, FIRST, WIDTH,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d loss / d logits of one tile of the vocabulary columns FIRST .. FIRST + WIDTH."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    local = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = FIRST + local
    tile = _logits(h_ptr, w_ptr, rows, cols, N, V, D, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
    label = tl.load(label_ptr + rows, mask=rows < N, other=-1).to(tl.int32)
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    grad = tl.load(grad_ptr + rows, mask=rows < N, other=0.0)
    p = tl.exp(tile - lse[:, None]) - tl.where(cols[None, :] == label[:, None], 1.0, 0.0)
    mask = (rows < N)[:, None] & (local < WIDTH)[None, :]
    tl.store(
        out_ptr + rows[:, None] * WIDTH + local[None, :], (p * grad[:, None]).to(out_ptr.dtype.element_ty), mask=mask
    )


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(d: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tiles; a row's loss has the same bits among any number of rows, so that they do not decide here."""
    half = dtype.itemsize == 2
    block_k = min(64 if half else 32, max(16, next_power_of_2(d)))
    wide = half and d % block_k == 0  # masked loads and fp32 products spill in larger tiles
    return {
        "EVEN_K": d % block_k == 0,
        "BLOCK_M": 128 if wide else 64 if half else 32,
        "BLOCK_N": 128 if wide else 64,
        "BLOCK_K": block_k,
        "num_warps": 8,
        "num_stages": 3,
    }


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in fp32, without rounding a sum that is still to be added to."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def linear_cross_entropy_triton(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    num_targets: int | None,
    reduce: bool,
    hidden_grad: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    assert not keep, "on a GPU nothing of the logits is kept"
    if hidden.dtype == torch.float64:  # the kernels accumulate in fp32
        return linear_cross_entropy_reference(hidden, weight, labels, ignore_index, num_targets, reduce, hidden_grad)
    (vocabulary, d), weight = weight.shape, weight.contiguous()
    rows, valid = _kept_rows(labels, vocabulary, ignore_index, num_targets)
    n = rows.numel()
    loss = hidden.new_zeros(labels.shape, dtype=torch.float32)
    lse = torch.zeros_like(loss)
    if n:
        config = _config(d, hidden.dtype)
        tiles = cdiv(vocabulary, config["BLOCK_N"])
        share = max(1, tiles // SPLITS)  # vocabulary tiles a program walks
        splits = cdiv(tiles, share)
        partial = hidden.new_empty((splits, n), dtype=torch.float32)
        target, kept_lse = hidden.new_empty((2, n), dtype=torch.float32)
        with device_of(hidden):
            _fwd_kernel[(cdiv(n, config["BLOCK_M"]), splits)](
                hidden.index_select(0, rows), weight, labels.index_select(0, rows), partial, target,
                n, vocabulary, d, share, **config,
            )  # fmt: skip
            _join_kernel[(cdiv(n, 16),)](partial, target, kept_lse, n, splits, BLOCK_S=128, BLOCK_N=16, num_warps=4)
        lse.index_copy_(0, rows, kept_lse)
        loss.index_copy_(0, rows, kept_lse - target)
    loss, lse = loss.mul_(valid), lse.mul_(valid)
    d_hidden = hidden.new_empty(0)
    if hidden_grad:
        one = loss.new_ones(())
        d_hidden, _ = linear_cross_entropy_bwd_triton(
            one, hidden, weight, labels, lse, ignore_index, num_targets, True, False
        )
    return loss.sum() if reduce else loss, lse, d_hidden


def linear_cross_entropy_bwd_triton(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    num_targets: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert kept is None
    if hidden.dtype == torch.float64:
        return linear_cross_entropy_bwd_reference(
            grad, hidden, weight, labels, lse, ignore_index, num_targets, hidden_grad, weight_grad
        )
    (vocabulary, d), weight = weight.shape, weight.contiguous()
    rows, valid = _kept_rows(labels, vocabulary, ignore_index, num_targets)
    n = rows.numel()
    d_hidden = hidden.new_zeros(hidden.shape) if hidden_grad else hidden.new_empty(0)
    d_weight = weight.new_empty(weight.shape if weight_grad else (0,))
    if not n:
        return d_hidden.mul_(valid), d_weight.zero_().mul_(valid)
    kept, kept_labels, kept_lse = hidden.index_select(0, rows), labels.index_select(0, rows), lse.index_select(0, rows)
    kept_grad = (grad.index_select(0, rows) if grad.dim() else grad.expand(n)).float().contiguous()
    total = hidden.new_zeros((n, d), dtype=torch.float32) if hidden_grad else None
    config = _config(d, hidden.dtype)
    width = max(GRADIENT_CHUNK // n // 1024, 1) * 1024
    for first in range(0, vocabulary, width):  # columns of the vocabulary: d_weight is written once, never accumulated
        last = min(first + width, vocabulary)
        tile = hidden.new_empty((n, last - first))
        with device_of(hidden):
            _bwd_kernel[(cdiv(n, config["BLOCK_M"]), cdiv(last - first, config["BLOCK_N"]))](
                kept, weight, kept_labels, kept_lse, kept_grad, tile, n, vocabulary, d, first, last - first, **config
            )
        if total is not None:
            total += _mm(tile, weight[first:last])
        if weight_grad:
            torch.mm(tile.t(), kept, out=d_weight[first:last])
    if total is not None:
        d_hidden.index_copy_(0, rows, total.to(hidden.dtype))
    return d_hidden, d_weight


# 4. operator ----------------------------------------------------------------------------------------------------------
_linear_cross_entropy = torch.library.custom_op(
    "fastmllm::linear_cross_entropy",
    linear_cross_entropy_reference,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, SymInt? num_targets, bool reduce,"
    " bool hidden_grad, bool keep=False) -> (Tensor, Tensor, Tensor)",
)
_linear_cross_entropy.register_kernel("cuda")(linear_cross_entropy_triton)

_linear_cross_entropy_bwd = torch.library.custom_op(
    "fastmllm::linear_cross_entropy_bwd",
    linear_cross_entropy_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor labels, Tensor lse, int ignore_index,"
    " SymInt? num_targets, bool hidden_grad, bool weight_grad, Tensor? kept=None) -> (Tensor, Tensor)",
)
_linear_cross_entropy_bwd.register_kernel("cuda")(linear_cross_entropy_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_linear_cross_entropy.register_fake
def _(hidden, weight, labels, ignore_index, num_targets, reduce, hidden_grad, keep=False):
    lse = hidden.new_empty(labels.shape, dtype=accumulator_dtype(hidden.dtype))
    early = hidden.new_empty(hidden.shape if hidden_grad else (0,))
    if keep:  # of the scored rows, where they are few
        early = hidden.new_empty((torch.library.get_ctx().new_dynamic_size(), weight.shape[0]))
    return lse.new_empty(()) if reduce else torch.empty_like(lse), lse, early


@_linear_cross_entropy_bwd.register_fake
def _(grad, hidden, weight, labels, lse, ignore_index, num_targets, hidden_grad, weight_grad, kept=None):
    return hidden.new_empty(hidden.shape if hidden_grad else (0,)), weight.new_empty(
        weight.shape if weight_grad else (0,)
    )


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    hidden, weight, labels, ctx.ignore_index, ctx.num_targets, ctx.reduce, ctx.hidden_grad, ctx.keep = inputs
    _, lse, early = output
    kept = (early,) if ctx.keep else ()
    ctx.save_for_backward(*((early, labels) if ctx.hidden_grad else (hidden, weight, labels, lse, *kept)))
    ctx.mark_non_differentiable(lse, early)


def _backward(ctx, grad, _grad_lse, _grad_early):
    d_hidden = d_weight = None
    if ctx.hidden_grad:
        d_hidden, labels = ctx.saved_tensors  # of a loss with gradient 1; ignored rows keep their zeros
        scale = grad.masked_fill(labels == ctx.ignore_index, 0).unsqueeze(1) if grad.dim() else grad
        d_hidden = (d_hidden * scale).to(d_hidden.dtype)
    else:
        hidden, weight, labels, lse, *kept = ctx.saved_tensors
        d_hidden, d_weight = _linear_cross_entropy_bwd(
            grad.contiguous(), hidden, weight, labels, lse, ctx.ignore_index, ctx.num_targets,
            *ctx.needs_input_grad[:2], *kept,
        )  # fmt: skip
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    return d_hidden if need_hidden else None, d_weight if need_weight else None, *(None,) * 6


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_targets: int | None = None,
    weights: Tensor | None = None,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """Cross entropy of `hidden @ weight^T` against `labels`, at the cost of the rows that have a label.

    Args:
        hidden: (T, D) float tensor, the rows after the model's final norm.
        weight: (V, D) head in the dtype of `hidden`; frozen, it costs nothing in backward.
        labels: (T,) integer ids, already aligned with the rows; `ignore_index` where a row is not scored.
        ignore_index: the label of rows that are not scored; no logits are computed for them.
        reduction: "mean" over the scored rows, "sum", or "none".
        num_targets: the number of scored rows, where the host knows it: then a GPU is not waited for.
        weights: (T,) float factor of each row's loss, differentiable; not read in ignored rows.
        divisor: what "mean" divides by, in place of these rows' number (or sum of weights): the total over
            micro-batches and ranks, a host number or a scalar tensor, so that every token counts alike. Where gradients
            are averaged over ranks (DDP, ZeRO), give the total divided by the number of ranks. A negative tensor, which
            is not waited for, makes the loss NaN.

    Returns:
        Loss in fp32 (fp64 for fp64): a scalar, or (T,) with zeros in ignored rows for "none". With nothing to score
        the loss is 0 and so are the gradients. On a GPU that is told `num_targets`, a label outside of the vocabulary
        or a wrong count gives NaN, because an error would have to wait for the device: the loss, the gradient of
        `weight`, and that of the rows in question. There a row's loss has the same bits among any other rows.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a label is outside of the vocabulary; `num_targets` is wrong.

    Equal to torch.nn.functional.cross_entropy(hidden @ weight.T, labels) except for the empty mean, which is 0 here;
    with `divisor`, to transformers' `ForCausalLMLoss(..., num_items_in_batch)` on shifted labels.
    """
    _check(hidden, weight, labels)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"fastmllm::linear_cross_entropy: reduction {reduction!r} is none of 'mean', 'sum', 'none'")
    if weights is not None and (
        weights.shape != labels.shape or not weights.is_floating_point() or weights.device != labels.device
    ):
        raise ValueError(f"fastmllm::linear_cross_entropy: weights {tuple(weights.shape)} {weights.dtype} on "
                         f"{weights.device} must be floats, one for each of labels {tuple(labels.shape)} on "
                         f"{labels.device}")  # fmt: skip
    if divisor is not None:
        bad = divisor.numel() != 1 if isinstance(divisor, Tensor) else divisor < 0
        if bad or reduction != "mean":
            raise ValueError(f"fastmllm::linear_cross_entropy: divisor {divisor} must be one number >= 0, and is for "
                             f"reduction 'mean', not {reduction!r}")  # fmt: skip
    # a frozen head on the CPU: the gradient comes with the loss (2 products instead of 3)
    on_cpu = hidden.device.type == "cpu" and torch.is_grad_enabled()
    early = on_cpu and hidden.requires_grad and not weight.requires_grad
    # a learning one: the logits of few rows are worth keeping; how many there are a compiler does not know
    keep = on_cpu and weight.requires_grad and not torch.compiler.is_compiling()
    reduce = reduction != "none" and weights is None
    loss, _, kept = _linear_cross_entropy(hidden, weight, labels, ignore_index, num_targets, reduce, early, keep)
    again = not early and not (keep and kept.numel())
    report("linear_cross_entropy", hidden, weight, labels, ignore_index, num_targets, again)
    scored = labels != ignore_index
    if weights is not None:
        weights = torch.where(scored, weights.to(loss.dtype), 0.0)
        loss = loss * weights
        loss = loss if reduction == "none" else loss.sum()
    if reduction != "mean":
        return loss
    if divisor is None:
        divisor = weights.sum() if weights is not None else scored.sum() if num_targets is None else num_targets
    if isinstance(divisor, Tensor):
        divisor = divisor.to(loss).reshape(())
        return loss / torch.where(divisor == 0, 1.0, divisor.masked_fill(divisor < 0, float("nan")))
    return loss / (divisor or 1)


def sequence_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    average: bool = False,
    ignore_index: int = -100,
    num_targets: int | None = None,
) -> Tensor:
    """Sum the log-probabilities of each packed sequence's labels under the head, without its logits.

    Args:
        hidden: (T, D) float tensor, the rows after the model's final norm.
        weight: (V, D) head in the dtype of `hidden`.
        labels: (T,) integer ids, already aligned with the rows; `ignore_index` where a row is not scored.
        cu_seqlens: (S + 1,) rising integers, boundaries of the sequences; rows behind the last belong to none.
        average: divide by the scored rows of each sequence (SimPO, arXiv 2405.14734; ORPO) instead of the sum (DPO).
        ignore_index: as `linear_cross_entropy`.
        num_targets: as `linear_cross_entropy`.

    Returns:
        (S,) in fp32 (fp64 for fp64), differentiable; 0 for a sequence without scored rows.

    Raises:
        ValueError: as `linear_cross_entropy`; `cu_seqlens` is not a row of integers on the same device.

    Equal to the sum of log_softmax(hidden @ weight.T) at the labels, the log pi(y | x) of DPO (arXiv 2305.18290).
    """
    if cu_seqlens.dim() != 1 or not cu_seqlens.numel() or cu_seqlens.is_floating_point():
        raise ValueError(f"fastmllm::linear_cross_entropy: cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} "
                         "must be (S + 1,) integers")  # fmt: skip
    if cu_seqlens.device != labels.device:
        raise ValueError(f"fastmllm::linear_cross_entropy: cu_seqlens is on {cu_seqlens.device}, labels on "
                         f"{labels.device}")  # fmt: skip
    losses = linear_cross_entropy(
        hidden, weight, labels, ignore_index=ignore_index, reduction="none", num_targets=num_targets
    )
    total = _sum_segments(losses, cu_seqlens)
    if average:
        total = total / _sum_segments(labels != ignore_index, cu_seqlens).clamp(min=1)
    return -total.to(losses.dtype)


def _sum_segments(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum (T,) to (S,) in fp64: the order of the summands, which depends on the neighbours, does not show."""
    offsets = cu_seqlens.long().clamp(0, values.shape[0])  # unsafe: a GPU is not waited for to look at them
    return torch.segment_reduce(values.double(), "sum", offsets=offsets, axis=0, unsafe=True, initial=0)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(f"fastmllm::linear_cross_entropy: expected hidden (T, D), weight (V, D), labels (T,), but "
                         f"they are {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(labels.shape)}")  # fmt: skip
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(f"fastmllm::linear_cross_entropy: hidden {hidden.dtype} and weight {weight.dtype} must be of "
                         "one floating point dtype")  # fmt: skip
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"fastmllm::linear_cross_entropy: labels must be integers, got {labels.dtype}")
    if not weight.shape[0]:
        raise ValueError(f"fastmllm::linear_cross_entropy: weight {tuple(weight.shape)} has no vocabulary")
    if not hidden.device == weight.device == labels.device:
        raise ValueError(f"fastmllm::linear_cross_entropy: hidden is on {hidden.device}, weight on {weight.device}, "
                         f"labels on {labels.device}")  # fmt: skip
