"""What all layers derive alike from one tensor that a model makes in every forward, derived once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastmllm.hf.fusion import STATE


def kept(tensor: Tensor, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `make(tensor)`, made once: it lives on the tensor, until that is written to or dies."""
    version = 0 if tensor.is_inference() else tensor._version  # inference tensors count no writes
    found = tensor.__dict__.get(STATE + name)
    if found is None or found[0] != version:
        found = tensor.__dict__[STATE + name] = (version, make(tensor))
    return found[1]
