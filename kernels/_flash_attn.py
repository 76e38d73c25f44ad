"""The packages of flash_attn, where one is installed and works: FA2, FA3 (Hopper) and FA4 (CuTe) behind one call.

What they leave undone is done here: rows behind the last segment become zeros, forward and in the gradients (they leave
uninitialised memory, vllm#57136), and a row that sees no key has log-sum-exp -inf (FA2 says +inf).

The same input gives the same gradients: their atomic additions to dq are put in order with deterministic=True, always.
That costs memory (FA2) and a fifth of the backward (FA3); FA3 before #1893 (September 2025) takes the flag and ignores
it. A package that lacks it, and FA3 at widths above 192, which refuses it, compute nothing that needs a gradient.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._triton import cdiv, device_of, tl, triton

# Generation -> (distribution, module, the argument that asks for the log-sum-exp). Installed is not enough: a build
# without a GPU leaves a shell, and the folder flash_attn of FA4 alone is not FA2.
_FLASH = {
    "FA2": ("flash-attn", "flash_attn", "return_attn_probs"),
    "FA3": ("flash-attn-3", "flash_attn_interface", "return_attn_probs"),
    "FA4": ("flash-attn-4", "flash_attn.cute", "return_lse"),
}
_PREFERENCE = {9: ("FA3", "FA4", "FA2"), 10: ("FA4", "FA2"), 11: ("FA4", "FA2")}  # by compute capability, else FA2
_Function = Callable[..., Any]


@functools.cache
def load() -> tuple[dict[str, str], dict[str, _Function]]:
    """Return the status of each generation, and the varlen functions of those that can be imported."""
    status, functions = {}, {}
    for name, (distribution, module, _) in _FLASH.items():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            status[name] = f"{distribution} is not installed"
            continue
        try:
            functions[name] = importlib.import_module(module).flash_attn_varlen_func
            status[name] = f"{distribution} {version}"
        except Exception as error:  # a broken build raises anything
            status[name] = f"{distribution} {version} is installed but does not work: {error}; Triton is used instead"
            warnings.warn(f"fastmllm::attention: {status[name]}", stacklevel=4)
    return status, functions


def flash_attn_status() -> dict[str, str]:
    """Return, for each generation of flash_attn (FA2, FA3, FA4), its version or why it is not used."""
    return dict(load()[0])


def _capability(q: Tensor) -> int | None:
    """Return the major compute capability of an NVIDIA GPU, None elsewhere."""
    return torch.cuda.get_device_capability(q.device)[0] if q.is_cuda and not torch.version.hip else None


def _choose(q: Tensor, k: Tensor, train: bool) -> str | None:
    """Return the generation that takes these tensors, or None for our own kernels."""
    capability = _capability(q)
    if capability is None or capability < 8 or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    d = q.shape[2]
    if d % 8 or not (q.numel() and k.numel()):
        return None
    functions = load()[1]
    for name in _PREFERENCE.get(capability, ("FA2",)):
        # FA4 compiles for sm_90a at every width; its backward on sm_100 takes multiples of 32 up to 128 (#2633)
        if name not in functions or (name == "FA4" and capability != 9 and (d % 32 or d > 128)):
            continue
        if not train or (_takes(name, "deterministic") and not (name == "FA3" and d > 192)):
            return name
    return None


def _takes(name: str, argument: str) -> bool:
    return argument in inspect.signature(load()[1][name]).parameters


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    causal: bool, softmax_scale: float, return_lse: bool,
) -> tuple[Tensor, Any] | None:  # fmt: skip
    """Call the flash_attn that is installed; autograd is its own.

    Returns:
        out (T, H, D) and, if wanted, the natural log-sum-exp (H, T), which carries no gradient; None where no
        installed generation takes these tensors, or it cannot return the log-sum-exp.

    Raises:
        RuntimeError: the package returns its log-sum-exp padded, as flash-attn before 2.7 does.
    """
    train = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if (name := _choose(q, k, train)) is None or cu_seqlens_q.numel() < 2 or not (max_seqlen_q and max_seqlen_k):
        return None
    function, ask = load()[1][name], _FLASH[name][2]
    if return_lse and not _takes(name, ask):  # FA3 before its commit 203b9b3
        return None
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    options = {"deterministic": True} if train else {}
    if return_lse:
        options[ask] = True
    if train:
        q, k, v = _ClearGradients.apply(q, k, v, cu_seqlens_q, cu_seqlens_k)
    found = function(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale, causal=causal, **options,
    )  # fmt: skip
    out, lse = found[:2] if isinstance(found, tuple) else (found, None)  # some always return a tuple
    clear_rows(out.data, cu_seqlens_q)  # .data: the backward saved `out`, and does not read these rows
    if not return_lse:
        return out, None
    if lse is None or lse.shape != (q.shape[1], q.shape[0]):
        raise RuntimeError(
            f"fastmllm::attention: {flash_attn_status()[name]} returns a log-sum-exp "
            f"{None if lse is None else tuple(lse.shape)} instead of (H, T) = {(q.shape[1], q.shape[0])}: install "
            "flash-attn 2.7 or newer"
        )
    lse = lse.detach().float()
    return out, torch.where(lse.isinf() | _behind(lse.shape[1], cu_seqlens_q), -math.inf, lse)


# Rows behind the last segment -----------------------------------------------------------------------------------------
class _ClearGradients(torch.autograd.Function):
    """Hand tensors on; on the way back write zeros to the gradients of rows behind the last segment."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k):
        ctx.save_for_backward(cu_seqlens_q, cu_seqlens_k)
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv):
        cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        for grad, cu in ((dq, cu_seqlens_q), (dk, cu_seqlens_k), (dv, cu_seqlens_k)):
            clear_rows(grad, cu)  # in place: between that backward and this one nobody else has it
        return dq, dk, dv, None, None


def _behind(rows: int, cu_seqlens: Tensor) -> Tensor:
    return torch.arange(rows, device=cu_seqlens.device) >= cu_seqlens[-1]


@triton.jit(do_not_specialize=["segments", "total"])
def _clear_kernel(ptr, cu_ptr, segments, total, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    end = tl.load(cu_ptr + segments).to(tl.int64)
    first = end * WIDTH + tl.program_id(0) * BLOCK
    for start in range(first, total, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(ptr + at, tl.zeros((BLOCK,), ptr.dtype.element_ty), mask=at < total)


def clear_rows_triton(t: Tensor, cu_seqlens: Tensor) -> None:
    block, programs = 1024, 64  # fixed: how many rows there are to clear only the device knows, mostly none
    with device_of(t):
        _clear_kernel[(min(programs, cdiv(t.numel(), block)),)](
            t, cu_seqlens, cu_seqlens.numel() - 1, t.numel(), WIDTH=t[0].numel(), BLOCK=block
        )


def clear_rows(t: Tensor, cu_seqlens: Tensor) -> None:
    """Write zeros in place to the rows of `t` (T, ...) behind cu_seqlens[-1]; the host does not wait."""
    if t.is_cuda and t.is_contiguous() and t.numel():
        clear_rows_triton(t, cu_seqlens)
    else:
        t.masked_fill_(_behind(t.shape[0], cu_seqlens).view(-1, *[1] * (t.dim() - 1)), 0.0)
