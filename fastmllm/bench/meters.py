"""Meters of one call: FLOPs, milliseconds, and the peak memory of the tensors that it makes."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def _attention_flops(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, *args, out_val=None, **kwargs) -> int:
    """Count QK^T and PV of every segment pair; causal segments count their lower triangle."""
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    width = q.shape[1] * q.shape[2]
    pairs = sum(
        m * n - (min(m, n) * (min(m, n) - 1)) // 2 if causal else m * n
        for m, n in zip(lengths_q, lengths_k, strict=True)
    )
    return 4 * width * pairs


def _attention_bwd_flops(grad, q, k, v, out, lse, cu_q, cu_k, *args, **kwargs) -> int:
    return 5 * _attention_flops(q, k, v, cu_q, cu_k, *args[:4]) // 2


def _patch_embed_flops(pixels, weight, *args, **kwargs) -> int:
    return 2 * pixels.numel() * weight.shape[1]


def _patch_embed_bwd_flops(grad, pixels, weight, patch_size, pixel_grad, weight_grad, *args, **kwargs) -> int:
    return 2 * pixels.numel() * weight.shape[1] * (bool(pixel_grad) + bool(weight_grad))


def _loss_flops(hidden, weight, labels, ignore_index, num_targets, reduce, hidden_grad, keep=False, **kwargs) -> int:
    kept = int((labels != ignore_index).sum()) if num_targets is None else num_targets
    return 2 * kept * weight.numel() * (2 if hidden_grad else 1)


def _gelu_mlp_flops(x, weight1, bias1, weight2, *args, **kwargs) -> int:
    return 2 * x.numel() // x.shape[-1] * (weight1.numel() + weight2.numel())


def _gelu_mlp_bwd_flops(grad, x, hidden, weight1, bias1, weight2, approximate, needs, **kwargs) -> int:
    rows = grad.numel() // grad.shape[-1]
    return 2 * rows * ((any(needs[:3]) + needs[3]) * weight2.numel() + (needs[0] + needs[1]) * weight1.numel())


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Return what the operators of fastmllm compute, by operator; each reads the tensors themselves."""
    table: dict[str, Callable[..., int]] = {
        "attention": _attention_flops,
        "attention_bwd": _attention_bwd_flops,
        "patch_embed": _patch_embed_flops,
        "patch_embed_bwd": _patch_embed_bwd_flops,
        "gelu_mlp": _gelu_mlp_flops,
        "gelu_mlp_bwd": _gelu_mlp_bwd_flops,
        "linear_cross_entropy": _loss_flops,
    }
    found: dict[Any, Callable[..., int]] = {}
    for name, formula in table.items():
        if hasattr(torch.ops.fastmllm, name):
            # FlopCounterMode passes shapes unless told that the formula reads the tensors
            formula._get_raw = True  # type: ignore[attr-defined]
            found[getattr(torch.ops.fastmllm, name)] = formula
    return found


def count_flops(call: Callable[[], Any]) -> int:
    """Return the floating point operations of a call (a multiply-add is two), fastmllm's operators included."""
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        call()
    return int(counter.get_total_flops())


class _LiveBytes(TorchDispatchMode):
    """Follow every storage that the calls inside create, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := id_of(tensor)) not in known and key not in self.seen:
                self._add(tensor, key)
        return out

    def _add(self, tensor: Tensor, key: int) -> None:
        storage = tensor.untyped_storage()
        self.seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by a call held at once, beyond what was there before.

    On a GPU the allocator's own count; on the CPU the storages that the dispatcher sees (not a kernel's scratch).
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _LiveBytes() as meter:
        call()
    return meter.peak


def milliseconds(call: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> float:
    """Return the median wall time of a call in milliseconds."""
    times = []
    for i in range(warmup + repeats):
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        if i >= warmup:
            times.append(1000 * (time.perf_counter() - start))
    return median(times) if times else math.nan


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
