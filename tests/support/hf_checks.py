"""What a patched model is held to: as near to fp64 as the unpatched model is, in logits, gradients and training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

STEPS = 32


def cast(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Cast what is floating point."""
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def outputs(model: nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Return logits, or a tower's outputs, in eval mode."""
    model.eval()
    with torch.no_grad():
        out = model(**{k: v for k, v in batch.items() if k != "labels"})
    named = {k: v for k, v in out.items() if torch.is_tensor(v) and v.is_floating_point() and "loss" not in k}
    return [named["logits"]] if "logits" in named else list(named.values())


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Return the training loss; of a tower, a fixed random functional of its outputs."""
    model.train()
    if "labels" in batch or batch.get("return_loss"):
        return model(**batch).loss
    parts = [v for v in model(**batch).values() if torch.is_tensor(v) and v.requires_grad]
    generator = torch.Generator().manual_seed(7)
    return sum((p * torch.randn(p.shape, generator=generator).to(p.dtype)).mean() for p in parts)


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter that gets one."""
    model.zero_grad(set_to_none=True)
    loss_of(model, batch).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def training(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Take some steps: the loss of each, and the parameters behind the last."""
    # at 0.05 some of them diverge, and then rounding alone moves the last parameters by their own size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses), {name: p.detach().double() for name, p in model.named_parameters()}


def distance(found: Any, truth: Any) -> float:
    """Return the largest difference of tensors, lists or dicts, over the largest number of the truth."""
    if torch.is_tensor(found):
        found, truth = [found], [truth]
    if isinstance(found, dict):
        assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
        found, truth = [found[k] for k in truth], list(truth.values())
    scale = max(float(t.double().abs().max()) for t in truth if t.numel())
    return (
        max(float((f.double() - t.double()).abs().max()) for f, t in zip(found, truth, strict=True) if t.numel())
        / scale
    )


def worst_parameter(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a gradient over its own largest number.

    A hundredth of the largest of all is added to that: keys' biases have none in exact arithmetic.
    """
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    floor = max(float(t.abs().max()) for t in truth.values() if t.numel()) / 100
    return max(
        float((found[n] - t).abs().max()) / (float(t.abs().max()) + floor) for n, t in truth.items() if t.numel()
    )


def allowed(unpatched: float, dtype: torch.dtype) -> float:
    """Return the error that a patched model may have where the unpatched one has this one."""
    return 2 * unpatched + 8 * torch.finfo(dtype).eps


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy in a dtype."""
    return copy.deepcopy(model).to(dtype)
