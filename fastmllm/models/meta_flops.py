"""Floating point operations on the meta device, where boundaries and chosen rows have no numbers.

They are taken for those of equal, longest segments; a selector that reads chosen rows reads one of each segment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmllm.models.flops import flop_formulas

Formula = Callable[..., int]


def meta_flop_formulas() -> dict[Any, Formula]:
    """Return `flop_formulas` for tensors without numbers."""
    found = flop_formulas()
    for name, make in (("attention", _boundaries), ("cross_attention", _ranges)):
        _replace(found, name, partial(_assuming, make=make, first=0, at=3))
        _replace(found, f"{name}_bwd", partial(_assuming, make=make, first=1, at=6))
    _replace(found, "attention_scores", _scores)
    _replace(found, "token_merge", partial(_cutting, at=3, longest=5))
    _replace(found, "greedy_diverse", partial(_cutting, at=1, longest=6))
    return found


def _replace(found: dict[Any, Formula], name: str, change: Callable[[Formula], Formula]) -> None:
    if hasattr(torch.ops.fastmllm, name):
        operator = getattr(torch.ops.fastmllm, name)
        found[operator] = change(found[operator])
        # FlopCounterMode passes shapes unless told that the formula reads the tensors
        found[operator]._get_raw = True  # type: ignore[attr-defined]


def _assuming(formula: Formula, make: Callable[..., tuple[Tensor, Tensor]], first: int, at: int) -> Formula:
    def count(*args: Any, **keywords: Any) -> int:
        q, k = args[first : first + 2]
        return formula(*args[:at], *make(len(q), len(k), *args[at + 2 : at + 4]), *args[at + 2 :], **keywords)

    return count


def _cutting(formula: Formula, at: int, longest: int) -> Formula:
    """Give a selector, whose tokens are its first argument, its boundaries."""

    def count(*args: Any, **keywords: Any) -> int:
        return formula(*args[:at], _equal(len(args[0]), args[longest]), *args[at + 1 :], **keywords)

    return count


def _scores(formula: Formula) -> Formula:
    def count(q: Tensor, k: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_k: int, *rest: Any, **kw: Any) -> int:
        keys = _equal(len(k), max_k)
        queries = torch.linspace(0, len(q), len(keys)).long()
        causal, scale, reduce, start, stop, *others = rest
        if start is not None:
            start, stop = torch.zeros(len(keys) - 1), torch.ones(len(keys) - 1)
        return formula(q, k, lse, queries, keys, max_k, causal, scale, reduce, start, stop, *others, **kw)

    return count


def _equal(rows: int, longest: int) -> Tensor:
    return torch.tensor([*range(0, rows, max(longest, 1)), rows])


def _boundaries(rows: int, keys: int, longest_q: int, longest_k: int) -> tuple[Tensor, Tensor]:
    return _equal(rows, longest_q), _equal(keys, longest_k)


def _ranges(rows: int, keys: int, longest_q: int, longest_k: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, dtype=torch.int64), torch.full((rows,), min(longest_k, keys))
