"""Measure a step: what it held, what was computed, how long was waited, on every rank."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fastmllm.data.balance import spread
from fastmllm.train.engine import Engine
from fastmllm.train.flops import FlopMeter
from fastmllm.train.meters import MeterConfig
from fastmllm.train.peaks import own_peak

T = TypeVar("T")
VISION = ("vision", "images")  # what models call the part that images go through


class StepMeter:
    """Watch a model through a stage; make it before the engine, which may take the weights apart.

    Args:
        model: with a part named as in `VISION`, where it has one.
        config: the peak, if it is given.
        dtype: of the products, for the table of peaks.
    """

    def __init__(self, model: nn.Module, config: MeterConfig, dtype: str) -> None:
        parts = [part for name in VISION if isinstance(part := getattr(model, name, None), nn.Module)]
        self.flops = FlopMeter(model, parts[0] if parts else None)
        self._config, self._dtype = config, dtype
        self._waited = 0.0

    def wait(self, result: Callable[[], T]) -> T:
        """Return a result, and count the seconds until it is there as waiting for batches."""
        began = time.perf_counter()
        try:
            return result()
        finally:
            self._waited += time.perf_counter() - began

    def fields(self, engine: Engine, micro: Sequence[Any], tick: float) -> dict[str, Any]:
        """Return what `StepRecord` has of a step from here on; every rank calls it, behind the wait for the device.

        Args:
            engine: of the step.
            micro: this rank's batches.
            tick: `time.perf_counter` when the step began.
        """
        work = self.flops.take()
        contents = [batch_contents(batch) for batch in micro]
        ranks = engine.counts_of_ranks(
            *(sum(column) for column in zip(*contents, strict=True)),
            round(work.model),
            round(work.hardware),
            round(work.vision),
            round(1e6 * work.vision_s),
            round(1e6 * self._waited),
            peak_memory(engine.device),
        )
        self._waited = 0.0
        tokens, visual, samples, padding, pixels, shown, budget, model, hardware, vision, vision_us, wait_us, memory = (
            list(column) for column in zip(*ranks, strict=True)
        )
        peak = self._config.peak_tflops or own_peak(engine.device, self._dtype)
        step_s = time.perf_counter() - tick
        promised = None if peak is None else 1e12 * peak * len(ranks) * step_s
        return {
            "tokens": sum(tokens),
            "step_ms": 1000 * step_s,
            "visual_tokens": sum(visual),
            "samples": sum(samples),
            "padding": sum(padding) / max(1, sum(tokens)),
            "unfilled": 1 - sum(tokens) / sum(budget) if sum(budget) else None,
            "pixel_waste": 1 - sum(shown) / sum(pixels) if sum(pixels) else None,
            "wait_ms": max(wait_us) / 1000,
            "vision_ms": sum(vision_us) / len(ranks) / 1000 if any(vision_us) else None,
            "vision_max_ms": max(vision_us) / 1000 if any(vision_us) else None,
            "vision_spread": spread(vision) if any(vision) else None,
            "memory_gib": max(memory) / 2**30,
            "model_tflop": sum(model) / 1e12,
            "hardware_tflop": sum(hardware) / 1e12,
            "mfu": None if promised is None else sum(model) / promised,
            "hfu": None if promised is None else sum(hardware) / promised,
        }


def batch_contents(batch: Any) -> tuple[int, int, int, int, int, int, int]:
    """Return tokens, visual tokens, samples, wasted tokens, encoder pixels and what of them shows something, budget.

    Args:
        batch: packed, or pairs and answers with a packed `batch` inside; host numbers and tensors on the CPU.
    """
    inner = getattr(batch, "batch", batch)
    tokens = getattr(inner, "num_tokens", None) or inner.input_ids.numel()
    visual = getattr(inner, "num_visual_tokens", 0)
    wasted = tokens if batch.num_targets == 0 else getattr(inner, "num_padding", 0)
    pixels, shown = getattr(inner, "encoder_pixels", (0, 0))
    return tokens, visual, len(batch.ids), wasted, pixels, shown, getattr(inner, "budget", 0)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: by tensors on a GPU, by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
