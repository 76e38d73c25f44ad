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
    """Record what computes on the meta device: it holds no values, so who waits for one of them fails.

    `copies` are those from the host; none of them may block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copies: list[str] = []

    @property
    def launches(self) -> int:
        return sum(KERNELS.get(name, 1) for name in self.names + self.copies)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name().removeprefix("aten::")
        given = [t.is_meta for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        made = any(t.is_meta for t in tree_flatten(out)[0] if isinstance(t, Tensor))
        if any(given) and not (function.is_view or "empty" in name or "view" in name or name == "detach"):
            self.names.append(name)
        elif made and not any(given) and "empty" not in name:
            if given:
                assert (kwargs or {}).get("non_blocking"), f"{name} makes the host wait for its copy"
            self.copies.append(name)
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


def device_calls(compressor, tokens, evidence=None) -> DeviceCalls:
    """Return what one call asks of the device; it fails where it waits for it."""
    compressor, tokens, evidence = compressor.to("meta"), on_meta(tokens), on_meta(evidence)
    with torch.no_grad(), DeviceCalls() as calls:
        out, _ = compressor(tokens, evidence)
    assert out.x.is_meta
    return calls


def launches(compressor, tokens, evidence) -> int:
    """Return what one call launches."""
    return device_calls(compressor, tokens, evidence).launches


def assert_compiles(compressor, tokens) -> None:
    """Check that it is one graph of `torch.compile`, with the same values."""
    torch.compiler.reset()
    compiled = torch.compile(lambda x: compressor(tokens.with_x(x))[0].x, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens.x), compressor(tokens)[0].x)
