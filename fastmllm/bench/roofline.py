"""The time that a call would take if every product ran at the machine's own best rate: what a saving promises.

Both rates are measured beside what is judged: operations per second in a large matrix product, bytes per second in a
copy. A call's time is the sum over its products (linear, attention, patches, MLP, loss) of the longer of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastmllm.bench.meters import milliseconds
from fastmllm.models.flops import flop_formulas


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a machine does in a second: floating point operations of a dtype, and bytes read or written."""

    flops: float
    bytes: float


def measure_rates(dtype: torch.dtype, device: torch.device | str = "cpu", side: int = 2048) -> Rates:
    """Measure a square product of a dtype, and a copy that no cache holds; medians."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = milliseconds(lambda: a @ b, repeats=7, warmup=2)
    source = torch.empty(1 << 27, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), repeats=7, warmup=2)
    return Rates(flops=2e3 * side**3 / product, bytes=2e3 * len(source) / copy)


@dataclass(slots=True)
class Work:
    """Products: their operations, the bytes that they read and write, and the seconds that they take at the least."""

    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Products(TorchDispatchMode):
    """Count the products of the calls inside.

    Args:
        rates: of the machine.
        formulas: of operators of our own; other ones on the meta device.

    Attributes:
        work: of all products.
    """

    def __init__(self, rates: Rates, formulas: Mapping[Any, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self.rates, self.work = rates, Work()
        own = flop_formulas() if formulas is None else formulas
        self.formulas: dict[Any, Callable[..., int]] = {**flop_registry, **own}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        formula = self.formulas.get(func.overloadpacket)
        if formula is None:  # under inference_mode a linear layer comes whole
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        out = func(*args, **(kwargs or {}))
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.count(tensors, flops, sum(t.numel() * t.element_size() for t in tensors))
        return out

    def count(self, tensors: Sequence[Tensor], flops: int, moved: int) -> Work:
        """Add a product.

        Args:
            tensors: that it reads and writes.
            flops: operations.
            moved: bytes.

        Returns:
            What was added.
        """
        one = Work(flops, moved, max(flops / self.rates.flops, moved / self.rates.bytes))
        self.work.flops += flops
        self.work.bytes += moved
        self.work.seconds += one.seconds
        return one


def roofline_ms(call: Callable[[], Any], rates: Rates) -> float:
    """Return the milliseconds that the products of a call take at these rates."""
    with torch.no_grad(), Products(rates) as counter:
        call()
    return 1000 * counter.work.seconds
