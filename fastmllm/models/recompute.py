"""Gradient checkpointing of chosen modules: their activations are computed again in the backward pass, not kept.

A module's class is swapped for one of the same name whose call is a non-reentrant checkpoint. The call, not `forward`:
hooks (ZeRO-3's, which gather weights) then run in both passes. Names of parameters stay.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@functools.cache
def _recomputed(cls: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return cls.__call__(self, *args, **keywords)
        return checkpoint(cls.__call__, self, *args, use_reentrant=False, **keywords)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "_recomputed_from": cls})


def is_recomputed(module: nn.Module) -> bool:
    """Tell whether a module is computed again in the backward pass."""
    return hasattr(type(module), "_recomputed_from")


def recompute(modules: Iterable[nn.Module], on: bool = True) -> None:
    """Let modules be computed again in the backward pass, or no longer."""
    for module in modules:
        kind: Any = type(module)
        if on and not is_recomputed(module):
            module.__class__ = _recomputed(kind)
        elif not on and is_recomputed(module):
            module.__class__ = kind._recomputed_from


@contextmanager
def recomputing(modules: Collection[nn.Module]) -> Iterator[None]:
    """Recompute modules inside of the block; those that were recomputed before stay so behind it."""
    mine = [module for module in modules if not is_recomputed(module)]
    recompute(mine)
    try:
        yield
    finally:
        recompute(mine, on=False)


def layers_of(model: nn.Module, names: Collection[str], *, whole: bool = False) -> list[nn.Module]:
    """Find what to recompute of a part of a model.

    Args:
        model: the part is somewhere in it.
        names: parameters of the part.
        whole: take the part's modules as they are; otherwise its layers, one by one, where it has any.

    Returns:
        Modules all of whose parameters are the part's, none inside of another.
    """
    part = set(names)
    return (not whole and _layers(model, "", part)) or _outermost(model, "", part)


def _layers(module: nn.Module, prefix: str, part: set[str]) -> list[nn.Module]:
    found = []
    for name, child in module.named_children():
        path = f"{prefix}{name}."
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and _belongs(child, path, part):
            found.append(child)
        else:
            found += _layers(child, path, part)
    return found


def _outermost(module: nn.Module, prefix: str, part: set[str]) -> list[nn.Module]:
    found = []
    for name, child in module.named_children():
        path = f"{prefix}{name}."
        if _belongs(child, path, part) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            found.append(child)
        else:
            found += _outermost(child, path, part)
    return found


def _belongs(module: nn.Module, prefix: str, part: set[str]) -> bool:
    own = [prefix + name for name, _ in module.named_parameters(remove_duplicate=False)]
    return bool(own) and part.issuperset(own)
