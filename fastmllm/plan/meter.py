"""A meter for models without numbers: whose product is it, how long does it take at the least, what is alive then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastmllm.bench.meters import LiveBytes, id_of
from fastmllm.bench.roofline import Products, Rates, Work
from fastmllm.models.meta_flops import meta_flop_formulas

COMPRESSOR = "compressor"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of an answer.

    Args:
        parts: its products by what they belong to: a role of the model's weights, its attention, or the compressor.
        peak: most bytes alive at once beside weights and, in decoding, beside the caches.
    """

    parts: Mapping[str, Work]
    peak: int

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.parts.values())

    @property
    def bytes(self) -> int:
        return sum(work.bytes for work in self.parts.values())

    @property
    def seconds(self) -> float:
        return sum(work.seconds for work in self.parts.values())


class Meter(Products):
    """Count products by what they belong to: that of the last weight that was multiplied.

    Args:
        rates: of the device.
        owners: storage of a weight -> whose it is.

    Attributes:
        parts: work by owner; what comes before any weight has `owner`, which the caller may set.
        peak: most bytes alive at once in `watching`, without what was there before.
    """

    def __init__(self, rates: Rates, owners: Mapping[int, str]) -> None:
        super().__init__(rates, meta_flop_formulas())
        self.owners, self.owner, self.peak = owners, "", 0
        self.parts: dict[str, Work] = {}

    def count(self, tensors: Sequence[Tensor], flops: int, moved: int) -> Work:
        """Add a product to its owner's, or to its owner's attention where no weight is in it."""
        found = next((self.owners[key] for t in tensors if (key := id_of(t)) in self.owners), None)
        self.owner = found or self.owner
        name = self.owner if found or self.owner == COMPRESSOR else f"{self.owner} attention"
        one, part = super().count(tensors, flops, moved), self.parts.setdefault(name, Work())
        part.flops, part.bytes, part.seconds = part.flops + flops, part.bytes + moved, part.seconds + one.seconds
        return one

    def phase(self) -> Phase:
        """Return what was counted."""
        return Phase(parts=self.parts, peak=self.peak)

    @contextmanager
    def compressing(self, compressors: Sequence[nn.Module]) -> Iterator[None]:
        """Own what these modules do, wherever they are called."""
        before: list[str] = []

        def enter(module: nn.Module, args: Any) -> None:
            before.append(self.owner)
            self.owner = COMPRESSOR

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.owner = before.pop()

        hooks = [module.register_forward_pre_hook(enter) for module in compressors]
        hooks += [module.register_forward_hook(leave) for module in compressors]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def watching(self, owner: str) -> Iterator[None]:
        """Count the calls inside; products before any weight are `owner`'s."""
        self.owner = owner
        with ExitStack() as stack:
            live = stack.enter_context(LiveBytes())
            for mode in (torch.no_grad(), _CachedAttention(self), self):
                stack.enter_context(mode)  # type: ignore[arg-type]
            yield
        self.peak = max(self.peak, live.peak)


class _CachedAttention(TorchFunctionMode):
    """Count torch's attention over a cache by what a flash kernel reads: on the meta device it is taken to pieces."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]  # (B, H, n, D), (B, Hkv, L, D)
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        flops = 2 * query.shape[:-1].numel() * key.shape[2] * (query.shape[-1] + value.shape[-1])
        tensors = (query, key, value, out)
        self.meter.count(tensors, flops, sum(t.numel() * t.element_size() for t in tensors))
        return out


def owners_of(model: nn.Module, roles: Mapping[str, Sequence[str]]) -> dict[int, str]:
    """Return whose each weight's storage is, by role."""
    weights = dict(model.named_parameters(remove_duplicate=False))  # a tied head has two names
    return {id_of(weights[name]): role for role, names in roles.items() for name in names}
