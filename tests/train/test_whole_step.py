"""Micro-batches are looked at before any is learned from: what is random is drawn alike both times."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.train.whole_step import look_ahead


class Compares(nn.Module):
    def forward(self, batch: Tensor, compared: Tensor | None = None, *, embed: bool = False) -> Tensor:
        drawn = torch.nn.functional.dropout(batch, 0.5, training=True)
        return drawn if compared is None else torch.stack([drawn, compared])

    def compare(self, seen: list[Tensor]) -> list[Tensor]:
        return [part + 0 * sum(seen) for part in seen]


class Alone:
    device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.module, self.graphs = module, []

    def embed(self, batch: Tensor) -> Any:
        return self.module(batch, embed=True)


class Counts:
    backward = staticmethod(nullcontext)


def test_both_looks_draw_the_same() -> None:
    module = Compares()
    micro = [torch.ones(64), 2 * torch.ones(64), 3 * torch.ones(64)]
    torch.manual_seed(0)
    expected = [module(batch) for batch in micro]
    torch.manual_seed(0)
    further = look_ahead(Alone(module), module, micro, Counts())  # type: ignore[arg-type]
    for batch, given, first in zip(micro, further, expected, strict=True):
        again, seen = module(batch, *given)
        assert torch.equal(again, first)
        assert torch.equal(seen, first)
    assert not torch.equal(expected[0], expected[1] / 2)


def test_what_compares_nothing_or_stands_alone_is_looked_at_once() -> None:
    module, micro = Compares(), [torch.ones(4), torch.ones(4)]
    assert look_ahead(Alone(module), nn.Identity(), micro, Counts()) == [(), ()]  # type: ignore[arg-type]
    assert look_ahead(Alone(module), module, micro[:1], Counts()) == [()]  # type: ignore[arg-type]
