"""Make bf16 arithmetic right in the Triton interpreter, which computes on the raw 16-bit patterns.

Import before a kernel is launched. Widens to fp32, computes, rounds to nearest even; on a GPU nothing is changed.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def _is_bf16(handle) -> bool:
    return getattr(handle.dtype, "scalar", handle.dtype) == tl.bfloat16


def _widen(bits):
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(values):
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _patch_elementwise(name: str) -> None:
    original = getattr(Builder, name)

    def patched(self, *handles):
        *args, op = handles
        if not any(isinstance(h, Handle) and _is_bf16(h) for h in args):
            return original(self, *handles)
        out = op(*[_widen(h.data) if _is_bf16(h) else h.data for h in args])
        return Handle(out if out.dtype == np.bool_ else _narrow(out), tl.bfloat16)

    setattr(Builder, name, patched)


def _patch_cast() -> None:
    original = Builder.cast_impl

    def patched(self, source, target):
        s, t = source.dtype.scalar, target.scalar
        fp8 = {d for d in (s, t) if d.is_floating() and d.primitive_bitwidth == 8}
        if s == t or fp8 or tl.bfloat16 not in (s, t):
            return original(self, source, target)
        if t == tl.bfloat16:
            return Handle(_narrow(source.data.astype(np.float32)), t)
        return Handle(_widen(source.data).astype(interpreter._get_np_dtype(t)), t)

    Builder.cast_impl = patched


def install() -> None:
    """Patch the interpreter once."""
    if getattr(Builder, "_fastmllm_bf16", False):
        return
    for name in ("binary_op", "unary_op", "ternary_op"):
        if hasattr(Builder, name):
            _patch_elementwise(name)
    _patch_cast()
    Builder._fastmllm_bf16 = True
