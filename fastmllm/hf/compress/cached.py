"""What a cache holds of a text that layers have lost columns of: one record beside it, which follows its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor

from fastmllm.hf.fusion import STATE

RECORD = STATE + "text"  # on a cache
GROWS = ("DynamicLayer", "DynamicSlidingWindowLayer")


@dataclass(frozen=True, slots=True)
class Left:
    """Columns of a text in one group of layers.

    Args:
        index: (B, T') int64 the column that each was, PAD for none.
        padded: there is a PAD.
        bias: (B, T') added to the scores of each as a key, or None.
    """

    index: Tensor
    padded: bool = False
    bias: Tensor | None = None

    def then(self, other: Left) -> Left:
        """Return these and the ones behind them."""
        bias = self.bias
        if bias is not None or other.bias is not None:
            biases = [x.index.new_zeros(x.index.shape, dtype=torch.float32) if x.bias is None else x.bias
                      for x in (self, other)]  # fmt: skip
            bias = torch.cat([b.to(biases[-1].dtype) for b in biases], 1)
        return Left(torch.cat([self.index, other.index], 1), self.padded or other.padded, bias)

    def resized(self, columns: int, by: int, least: int = 0) -> Left:
        """Return these of a text that has grown since, or from whose end something was taken back.

        Args:
            columns: the text had.
            by: columns that it has more, or less than 0.
            least: of these columns have to stay.

        Raises:
            ValueError: what was taken back is not text alone.
        """
        if by >= 0:
            return self.then(text(columns, by, len(self.index), self.index.device)) if by else self
        kept = self.index.shape[1] + by
        gone = torch.arange(columns + by, columns, device=self.index.device)
        if kept < least or not bool((self.index[:, kept:] == gone).all()):
            raise ValueError(
                f"compress: the cache was cropped by {-by} tokens, but only text behind its last image can be taken "
                "back, and none that is padded behind: fill a cache anew"
            )
        return Left(self.index[:, :kept], self.padded, None if self.bias is None else self.bias[:, :kept])


def text(first: int, columns: int, batch: int, device: torch.device) -> Left:
    """Return all columns of a text."""
    return Left(torch.arange(first, first + columns, device=device).expand(batch, -1))


@dataclass(frozen=True, slots=True)
class Held:
    """A cache's text.

    Args:
        columns: in its first layer.
        left: of those, behind each stage; None: all.
        given: columns of the text as it was given.
        kept: of those, what the connector leaves for the first layer; None: all.
        behind: columns of the first layer up to the last placeholder, where some are gone in front of it.
        lead: (B, 1) how far M-RoPE's positions are ahead of `kept`, or None.
    """

    columns: int = 0
    left: tuple[Left | None, ...] = ()
    given: int = 0
    kept: Left | None = None
    behind: int = 0
    lead: Tensor | None = None


@torch.compiler.disable
def held(cache: Any, batch: int, layers: Sequence[int] = ()) -> Held:
    """Return what a cache holds by now: text may have been added or taken back since it was noted.

    Args:
        cache: or None.
        batch: rows of the text that it goes on with.
        layers: in front of which there are stages.

    Raises:
        ValueError: the cache is of another batch, or of a kind that cannot be shorter in some layers, or what it has
            lost since is not text alone.
    """
    columns = 0 if cache is None else int(cache.get_seq_length())
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())} - set(GROWS)
    if kinds and layers:
        raise ValueError(
            f"compress: a cache of {', '.join(sorted(kinds))}: layers behind a stage hold fewer tokens, which a "
            "DynamicCache can"
        )
    seen: Held | None = getattr(cache, RECORD, None)
    if not columns or seen is None:
        return Held(columns, (None,) * len(layers), columns)
    rows = next((len(x.index) for x in (seen.kept, *seen.left) if x is not None), batch)
    if rows != batch:
        raise ValueError(
            f"compress: the cache is of {rows} rows, the text of {batch}; choose or repeat rows of a cache by its own "
            "methods, or fill one anew"
        )
    left = tuple(x and x.resized(seen.columns, columns - seen.columns) for x in seen.left or (None,) * len(layers))
    for layer, x in zip(layers, left, strict=True) if layers else ():
        if x is not None and int(cache.get_seq_length(layer)) != x.index.shape[1]:
            raise ValueError(
                f"compress: the cache was cropped to {columns} tokens, layer {layer} to "
                f"{int(cache.get_seq_length(layer))} of {x.index.shape[1]}: take as many off each, by crop(-n)"
            )
    if seen.kept is None:
        return Held(columns, left, columns)
    more = columns - seen.kept.index.shape[1]
    kept = seen.kept.resized(seen.given, more, seen.behind)
    return Held(columns, left, seen.given + more, kept, seen.behind, seen.lead)


MOVES: dict[str, Callable[[Tensor, Any], Tensor]] = {  # methods of a cache, and what they do to (B, …)
    "reorder_cache": lambda x, index: x[_there(index, x)],
    "batch_select_indices": lambda x, index: x[_there(index, x)],
    "batch_repeat_interleave": lambda x, times: x.repeat_interleave(times, 0),
}


@torch.compiler.disable
def note(cache: Any, held: Held) -> None:
    """Leave on a cache what it holds; its tensors (B, …) go where the cache's rows go."""
    setattr(cache, RECORD, held)
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
    setattr(cache, RECORD, _each(getattr(cache, RECORD), rows, lambda x: MOVES[method](x, by)))


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
