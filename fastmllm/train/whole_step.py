"""A loss that compares all samples of a step: the micro-batches are looked at before any of them is learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastmllm.train.engine import Engine
from fastmllm.train.flops import FlopMeter


def look_ahead(engine: Engine, module: nn.Module, micro: Sequence[Any], flops: FlopMeter) -> list[tuple[Any, ...]]:
    """Let a module that has `compare` see all micro-batches of a step (`fastmllm.models.dual_encoder.DualEncoder`).

    `module(batch, embed=True)` gives what is compared, without a graph; `module.compare(list of them)`, for each
    micro-batch, what `module(batch, compared)` takes. What is random is drawn twice alike: dropout is the same when a
    micro-batch is learned from. A step of one micro-batch needs no second look.

    Args:
        engine: of the step.
        module: that the engine runs.
        micro: this rank's batches.
        flops: counts what is computed here as computed again.

    Returns:
        Further arguments of each micro-batch's forward pass; none where nothing is compared.
    """
    compare = getattr(module, "compare", None)
    if compare is None or len(micro) == 1:
        return [() for _ in micro]
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), flops.backward():
        embedded = [engine.embed(batch) for batch in micro]
    return [(found,) for found in compare(embedded)]
