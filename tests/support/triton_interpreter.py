"""Make the Triton interpreter strict: right in bf16, blind to nothing outside of a tensor, and short.

It computes bf16 on the raw 16-bit patterns, and reads and writes out of bounds in silence. Here bf16 is widened to fp32
and rounded to nearest even, each storage that a kernel gets stands between guard zones, and programs are counted.
On a GPU nothing is changed.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle, Executor = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.GridExecutor
ZONE = 16384  # bytes on either side of a storage; all ones: NaN in every float format, -1 in integers
iterations = 0  # of programs and of their loops, since a test set it to 0


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


def _patch_guards() -> None:
    """Run each kernel on copies of its storages between guard zones, and look at the zones afterwards."""
    give, take_back = Executor._init_args_hst, Executor._restore_args_dev

    def guarded(self, args, kwargs):
        copies, zones = {}, []

        def move(arg):
            if not isinstance(arg, torch.Tensor):
                return arg
            storage = arg.untyped_storage()
            if storage.data_ptr() not in copies:
                size = storage.nbytes()
                buffer = torch.full((size + 2 * ZONE,), 0xFF, dtype=torch.uint8)
                raw = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))
                buffer[ZONE : ZONE + size] = raw
                copies[storage.data_ptr()] = (buffer, raw)
                zones.extend((buffer[:ZONE], buffer[ZONE + size :]))
            buffer, _ = copies[storage.data_ptr()]
            offset = ZONE // arg.element_size() + arg.storage_offset()
            return torch.empty(0, dtype=arg.dtype).set_(buffer.untyped_storage(), offset, arg.size(), arg.stride())

        self.copies, self.zones = copies, zones
        return give(self, [move(a) for a in args], {k: move(v) for k, v in kwargs.items()})

    def restored(self, args, args_host, kwargs, kwargs_host):
        take_back(self, [], [], {}, {})
        name = self.fn.__name__
        for zone in self.zones:
            assert bool((zone == 0xFF).all()), f"{name} wrote outside of a tensor"
        for buffer, raw in self.copies.values():
            raw.copy_(buffer[ZONE : ZONE + raw.numel()])

    Executor._init_args_hst, Executor._restore_args_dev = guarded, restored


def _patch_count() -> None:
    """Count program iterations: the trips of a program's loops, at least one."""
    call, move_on = Executor.__call__, Builder.set_grid_idx
    trips = 1

    def count(*bounds):
        nonlocal trips
        global iterations
        for i in range(*map(int, bounds)):
            trips += 1
            iterations += trips > 1  # the first is the program's own
            yield i

    def next_program(self, x, y, z):
        nonlocal trips
        global iterations
        trips, iterations = 0, iterations + 1
        return move_on(self, x, y, z)

    def counted(self, *args, **kwargs):
        self.fn.__globals__["range"] = count
        try:
            return call(self, *args, **kwargs)
        finally:
            del self.fn.__globals__["range"]

    Executor.__call__, Builder.set_grid_idx = counted, next_program


def install() -> None:
    """Patch the interpreter once."""
    if getattr(Builder, "_fastmllm_bf16", False):
        return
    for name in ("binary_op", "unary_op", "ternary_op"):
        if hasattr(Builder, name):
            _patch_elementwise(name)
    _patch_cast()
    _patch_guards()
    _patch_count()
    Builder._fastmllm_bf16 = True
