"""Splice visual tokens into packed text that holds one placeholder token an image (LLaVA, arXiv 2304.08485).

Shapes: S samples, T rows of text as users write it, V visual tokens, T' = T - images + V rows afterwards, D width.
The host knows every count, so it plans where each row goes, with labels, positions and boundaries; the device moves
each row once. Text whose placeholders are already repeated needs no plan: that is `insert_features`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native  # noqa: F401 - registers the CPU operator
from ._splice_plan import SplicePlan, splice_plan
from ._triton import cdiv, device_of, next_power_of_2, tl, triton

__all__ = ["SplicePlan", "splice_plan", "splice_tokens"]


# 1. reference ---------------------------------------------------------------------------------------------------------
def splice_tokens_reference(
    text: Tensor, visual: Tensor, source: Tensor, text_rows: Tensor, visual_rows: Tensor
) -> Tensor:
    return torch.cat((text, visual)).index_select(0, source)


def splice_tokens_bwd_reference(
    grad: Tensor, text_rows: Tensor, visual_rows: Tensor, text_grad: bool, visual_grad: bool
) -> tuple[Tensor, Tensor]:
    dtext, dvisual = grad.new_empty(0), grad.new_empty(0)
    if text_grad:  # a placeholder (-1) takes a row of zeros
        dtext = torch.cat((grad.new_zeros(1, grad.shape[1]), grad)).index_select(0, text_rows + 1)
    if visual_grad:
        dvisual = grad.index_select(0, visual_rows)
    return dtext, dvisual


# 2. Triton kernels ----------------------------------------------------------------------------------------------------
@triton.jit
def _splice_kernel(
    text_ptr, visual_ptr, source_ptr, out_ptr, T, M, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """out[m] = cat(text, visual)[source[m]]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    source = tl.load(source_ptr + rows, mask=rows < M, other=0)
    visual = source >= T
    mask = (rows < M)[:, None] & (cols < D)[None, :]
    a = tl.load(text_ptr + source[:, None] * D + cols[None, :], mask=mask & ~visual[:, None], other=0.0)
    b = tl.load(visual_ptr + (source - T)[:, None] * D + cols[None, :], mask=mask & visual[:, None], other=0.0)
    tl.store(out_ptr + rows[:, None] * D + cols[None, :], tl.where(visual[:, None], b, a), mask=mask)


@triton.jit
def _split_kernel(
    grad_ptr, text_rows_ptr, visual_rows_ptr, dtext_ptr, dvisual_ptr, T, R, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows 0 .. T are dtext's, the rest of R are dvisual's; a placeholder's (row -1) is zero."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    visual = rows >= T
    a = tl.load(text_rows_ptr + rows, mask=rows < T, other=-1)
    b = tl.load(visual_rows_ptr + (rows - T), mask=visual & (rows < R), other=-1)
    source = tl.where(visual, b, a)
    inside = (cols < D)[None, :]
    value = tl.load(grad_ptr + source[:, None] * D + cols[None, :], mask=(source >= 0)[:, None] & inside, other=0.0)
    tl.store(dtext_ptr + rows[:, None] * D + cols[None, :], value, mask=(rows < T)[:, None] & inside)
    tl.store(dvisual_ptr + (rows - T)[:, None] * D + cols[None, :], value, mask=(visual & (rows < R))[:, None] & inside)


# 3. launchers ---------------------------------------------------------------------------------------------------------
def _config(d: int, dtype: torch.dtype) -> dict[str, int]:
    """A program moves 8 KiB: four 16-byte words a thread."""
    elements = 8192 // dtype.itemsize
    block_d = min(next_power_of_2(d), elements)
    return {"BLOCK_M": elements // block_d, "BLOCK_D": block_d, "num_warps": 4}


def splice_tokens_triton(
    text: Tensor, visual: Tensor, source: Tensor, text_rows: Tensor, visual_rows: Tensor
) -> Tensor:
    text, visual, source = text.contiguous(), visual.contiguous(), source.contiguous()
    (t, d), m = text.shape, source.shape[0]
    out = text.new_empty((m, d))
    if out.numel():
        config = _config(d, text.dtype)
        with device_of(text):
            _splice_kernel[(cdiv(m, config["BLOCK_M"]), cdiv(d, config["BLOCK_D"]))](
                text, visual, source, out, t, m, d, **config
            )
    return out


def splice_tokens_bwd_triton(
    grad: Tensor, text_rows: Tensor, visual_rows: Tensor, text_grad: bool, visual_grad: bool
) -> tuple[Tensor, Tensor]:
    grad, d = grad.contiguous(), grad.shape[1]
    t, v = text_rows.shape[0] if text_grad else 0, visual_rows.shape[0] if visual_grad else 0
    dtext = grad.new_empty((t, d) if text_grad else (0,))
    dvisual = grad.new_empty((v, d) if visual_grad else (0,))
    if (t + v) * d:
        config = _config(d, grad.dtype)
        with device_of(grad):
            _split_kernel[(cdiv(t + v, config["BLOCK_M"]), cdiv(d, config["BLOCK_D"]))](
                grad, text_rows.contiguous(), visual_rows.contiguous(), dtext, dvisual, t, t + v, d, **config
            )
    return dtext, dvisual


# 4. operator ----------------------------------------------------------------------------------------------------------
_splice_tokens = torch.library.custom_op(
    "fastmllm::splice_tokens",
    splice_tokens_reference,
    mutates_args=(),
    schema="(Tensor text, Tensor visual, Tensor source, Tensor text_rows, Tensor visual_rows) -> Tensor",
)
_splice_tokens.register_kernel("cuda")(splice_tokens_triton)

_splice_tokens_bwd = torch.library.custom_op(
    "fastmllm::splice_tokens_bwd",
    splice_tokens_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor text_rows, Tensor visual_rows, bool text_grad, bool visual_grad) -> (Tensor, Tensor)",
)
_splice_tokens_bwd.register_kernel("cuda")(splice_tokens_bwd_triton)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_splice_tokens.register_fake
def _(text, visual, source, text_rows, visual_rows):
    return text.new_empty((source.shape[0], text.shape[1]))


@_splice_tokens_bwd.register_fake
def _(grad, text_rows, visual_rows, text_grad, visual_grad):
    d = grad.shape[1]
    dtext = grad.new_empty((text_rows.shape[0], d) if text_grad else (0,))
    return dtext, grad.new_empty((visual_rows.shape[0], d) if visual_grad else (0,))


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad):
    need_text, need_visual = ctx.needs_input_grad[:2]
    if grad is None:
        return None, None, None, None, None
    dtext, dvisual = _splice_tokens_bwd(grad.contiguous(), *ctx.saved_tensors, need_text, need_visual)
    return dtext if need_text else None, dvisual if need_visual else None, None, None, None


_splice_tokens.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def splice_tokens(text: Tensor, visual: Tensor, plan: SplicePlan) -> Tensor:
    """Replace each image's placeholder row by its visual tokens.

    Args:
        text: (T, D) float embeddings of the packed text; those of placeholders are not read.
        visual: (V, D) visual tokens, image after image in the order of the placeholders, same dtype.
        plan: made by `splice_plan`; its other tensors belong to the result.

    Returns:
        (T', D). In backward each row's gradient goes to the one row that it came from, placeholders' are zero.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the sample that lacks visual tokens is named.

    Equal to transformers' `inputs_embeds.masked_scatter(image_mask, image_features)` on embeddings of repeated
    placeholders, without embedding those, without the mask and without host synchronisation.
    """
    if text.dim() != 2 or visual.dim() != 2 or text.shape[1] != visual.shape[1]:
        raise ValueError(f"fastmllm::splice_tokens: text {tuple(text.shape)} must be (T, D) and visual "
                         f"{tuple(visual.shape)} (V, D)")  # fmt: skip
    if text.shape[0] != plan.text_rows.shape[0]:
        raise ValueError(f"fastmllm::splice_tokens: text {tuple(text.shape)}, but the plan is for "
                         f"{plan.text_rows.shape[0]} rows")  # fmt: skip
    if visual.shape[0] != plan.visual_rows.shape[0]:
        short = next((name for name, end in plan.visual_ends if end > visual.shape[0]), None)
        where = "some are left over after the last sample" if short is None else f"they run out in {short}"
        raise ValueError(f"fastmllm::splice_tokens: visual {tuple(visual.shape)}, but the plan is for "
                         f"{plan.visual_rows.shape[0]} visual tokens: {where}")  # fmt: skip
    if text.dtype != visual.dtype or not text.is_floating_point():
        raise ValueError(f"fastmllm::splice_tokens: text is {text.dtype} and visual {visual.dtype}: cast the visual "
                         "tokens to the dtype of the language model")  # fmt: skip
    if not text.device == visual.device == plan.source.device:
        raise ValueError(f"fastmllm::splice_tokens: text is on {text.device}, visual on {visual.device}, the plan on "
                         f"{plan.source.device}: plan.to(device) moves it")  # fmt: skip
    return _splice_tokens(text, visual, plan.source, plan.text_rows, plan.visual_rows)
