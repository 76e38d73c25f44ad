"""Triton where it is installed, a stand-in that says so where it is not, and the pieces every kernel shares."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        _REASON = f"Triton kernels need the package triton, which cannot be imported ({error}): pip install triton"

        class _Missing:
            """Let kernel files import without triton; a launch raises with the remedy."""

            def __call__(self, *args: Any, **kwargs: Any) -> _Missing:
                return self

            def __getattr__(self, name: str) -> _Missing:
                if name.startswith("__"):
                    raise AttributeError(name)
                return self

            def __getitem__(self, grid: Any) -> Any:
                raise ImportError(_REASON)

            def __bool__(self) -> bool:
                return False

        triton = tl = _Missing()

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc):
    """Multiply two tiles and accumulate in fp32; the interpreter multiplies bf16 bits as integers, so widen there."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the tensor's own GPU; do nothing on the CPU (interpreter, ahead-of-time compilation)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is >= n (at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype statistics and sums are kept in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
