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

from fastmllm.models.flops import flop_formulas


def count_flops(call: Callable[[], Any]) -> int:
    """Return the floating point operations of a call (a multiply-add is two), fastmllm's operators included."""
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        call()
    return int(counter.get_total_flops())


class LiveBytes(TorchDispatchMode):
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
    with LiveBytes() as meter:
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
