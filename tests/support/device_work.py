"""Count what a compressor asks of the device: run it on meta tensors, which hold no values to wait for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastmllm.compression.tokens import Tokens


class DeviceWork(TorchDispatchMode):
    """Record each operator that computes on meta tensors; `copies` are those from the host, none of them blocking."""

    def __init__(self):
        super().__init__()
        self.calls, self.copies = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, name = tree_flatten((args, kwargs))[0], function.name().removeprefix("aten::")
        on_device = [t.device.type == "meta" for t in given if isinstance(t, torch.Tensor)]
        if any(on_device) and not (function.is_view or "empty" in name or name == "detach"):
            self.calls.append(name)
        elif not any(on_device) and any(
            isinstance(t, torch.Tensor) and t.device.type == "meta" for t in tree_flatten(result)[0]
        ):
            if on_device:
                assert (kwargs or {}).get("non_blocking"), f"{name} makes the host wait for its copy"
            self.copies.append(name)
        return result


def device_work(compressor, tokens: Tokens, evidence=None) -> list[str]:
    """Return what the compressor computes on the device; a wait for a value raises."""
    meta = replace(tokens, **{
        name: getattr(tokens, name).to("meta") for name in ("x", "cu_seqlens", "pos", "size")
        if getattr(tokens, name) is not None
    }, planes=tuple(p.to("meta") for p in tokens.planes))  # fmt: skip
    compressor = compressor.to("meta")
    with DeviceWork() as calls:
        out, _ = compressor(meta, evidence)
    assert out.x.device.type == "meta"
    return calls.calls


def assert_compiles(compressor, tokens: Tokens) -> None:
    """Check that it is one graph of `torch.compile`, with the same values."""
    torch.compiler.reset()
    compiled = torch.compile(lambda x: compressor(tokens.with_x(x))[0].x, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens.x), compressor(tokens)[0].x)
