"""Run a compressor on tensors that cannot be waited for, and count what it asks of the device."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# kernels that an operator of ours launches; every operator of torch counts as one, a copy to the device too
KERNELS = {"fastmllm::token_select": 1, "fastmllm::greedy_diverse": 2, "fastmllm::attention_scores": 2}


class DeviceCalls(TorchDispatchMode):
    """Count launches on the meta device: it holds no values, so who waits for one of them fails."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @property
    def launches(self) -> int:
        return sum(KERNELS.get(name, 1) for name in self.names)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_flatten((args, kwargs, out))[0] if isinstance(t, Tensor)]
        if any(t.is_meta for t in tensors) and not (
            function.is_view or any(w in function.name() for w in ("empty", "view"))
        ):
            self.names.append(function.name())
        return out


def on_meta(thing):
    """Return tokens or evidence with all of their tensors on the meta device."""
    if isinstance(thing, Tensor):
        return thing.to("meta")
    if isinstance(thing, tuple):
        return tuple(map(on_meta, thing))
    if is_dataclass(thing):
        return replace(thing, **{f.name: on_meta(getattr(thing, f.name)) for f in fields(thing)})
    return thing


def launches(compressor, tokens, evidence) -> int:
    """Return what one call launches, and fail where it waits for the device."""
    tokens, evidence = on_meta(tokens), on_meta(evidence)
    with torch.no_grad(), DeviceCalls() as calls:
        compressor(tokens, evidence)
    return calls.launches
