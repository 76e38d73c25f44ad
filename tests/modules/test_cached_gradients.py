"""Gradients of a loss over all pairs, taken micro-batch by micro-batch, are those of all pairs at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmllm.models.contrastive import ClipLoss, SiglipLoss
from fastmllm.modules.cached_gradients import cache_gradients


def towers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"image": nn.Linear(5, 8), "text": nn.Sequential(nn.Linear(6, 8), nn.Tanh())})


def gradients(loss: nn.Module, model: nn.ModuleDict) -> list[Tensor]:
    found = [param.grad for param in (*model.parameters(), *loss.parameters())]
    assert all(grad is not None and grad.any() for grad in found)
    return found


@pytest.mark.parametrize("make", [ClipLoss, SiglipLoss])
@pytest.mark.parametrize("micro_batches", [2, 3, 6])
def test_micro_batches_learn_what_the_whole_step_teaches(make: Any, micro_batches: int) -> None:
    torch.manual_seed(1)
    x, y, whole, loss = torch.randn(6, 5), torch.randn(6, 6), towers(), make(0.3)
    value = loss(whole["image"](x), whole["text"](y))
    value.backward()

    model, parted = towers(), make(0.3)
    parts = list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True))
    with torch.no_grad():
        seen = [(model["image"](a), model["text"](b)) for a, b in parts]
    found = cache_gradients(parted.score, seen, parted.scales())
    assert len(found) == micro_batches
    for (a, b), cached in zip(parts, found, strict=True):
        part = parted(model["image"](a), model["text"](b), cached=cached)
        torch.testing.assert_close(part, value, rtol=1e-6, atol=0)
        (part / micro_batches).backward()
    for mine, expected in zip(gradients(parted, model), gradients(loss, whole), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_without_the_others_a_micro_batch_learns_something_else() -> None:
    """What accumulation without the cache would do: each micro-batch knows its own pairs only."""
    torch.manual_seed(1)
    x, y, loss = torch.randn(6, 8), torch.randn(6, 8), ClipLoss(0.3)
    apart = torch.stack([loss(a, b) for a, b in zip(x.chunk(3), y.chunk(3), strict=True)]).mean()
    assert (loss(x, y) - apart).abs() > 0.1
