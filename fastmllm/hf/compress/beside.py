"""What lies beside a cache follows its rows: beams that are reordered, rows that are chosen or repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor

from fastmllm.hf.fusion import STATE

MOVES: dict[str, Callable[[Tensor, Any], Tensor]] = {  # methods of a cache, and what they do to (B, …)
    "reorder_cache": lambda x, index: x[_there(index, x)],
    "batch_select_indices": lambda x, index: x[_there(index, x)],
    "batch_repeat_interleave": lambda x, times: x.repeat_interleave(times, 0),
}


@torch.compiler.disable
def put(cache: Any, name: str, value: Any) -> None:
    """Leave a value on a cache, whose tensors (B, …) go where the cache's rows go."""
    setattr(cache, name, value)
    plain: Any = type(cache)
    if not hasattr(plain, "_fastmllm_plain"):
        cache.__class__ = following(plain)  # not by methods of its own: a cycle would keep the cache's memory


@remembered
def following(plain: Any) -> type:
    """Return a subclass of a cache's class, of the same name, whose methods move what lies beside it too."""

    def moving(method: str) -> Callable[[Any, Any], None]:
        def move(self: Any, by: Any) -> None:
            _moved(self, method, by)

        return move

    def reduce(self: Any, protocol: Any) -> Any:
        parts: Any = plain.__reduce_ex__(self, protocol)
        made, (_, *given), *rest = parts
        return _remade, (made, plain, *given), *rest

    methods = {method: moving(method) for method in MOVES if hasattr(plain, method)}
    return type(plain.__name__, (plain,), {"_fastmllm_plain": plain, "__reduce_ex__": reduce, **methods})


def _remade(made: Callable[..., Any], plain: type, *given: Any) -> Any:
    return made(following(plain), *given)


def _moved(cache: Any, method: str, by: Any) -> None:
    rows = next((len(x.keys) for x in cache.layers if isinstance(getattr(x, "keys", None), Tensor)), None)
    getattr(type(cache)._fastmllm_plain, method)(cache, by)
    for name in [n for n in cache.__dict__ if n.startswith(STATE)]:
        setattr(cache, name, _each(getattr(cache, name), rows, lambda x: MOVES[method](x, by)))


def _each(value: Any, rows: int | None, move: Callable[[Tensor], Tensor]) -> Any:
    """Move the tensors of `rows` rows in tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        return move(value) if len(value) == rows else value
    if isinstance(value, list | tuple):
        return type(value)(_each(x, rows, move) for x in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _each(getattr(value, f.name), rows, move) for f in fields(value)})
    return value


def _there(index: Any, x: Tensor) -> Any:
    return index.to(x.device) if isinstance(index, Tensor) else index
