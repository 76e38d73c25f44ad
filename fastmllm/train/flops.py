"""Count the floating point operations of training steps by the layers that run, without waiting for the device.

A product of F operations in the forward pass takes F for the gradient of its input and F for that of its weight, if
they are wanted: a layer costs F where nothing in front of it or in it learns, 2 F where it is frozen between what
learns and the loss, 3 F where it learns. That is seen when it is called, from what its input and its weight require.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.kernels._watch import watched
from fastmllm.models.flops import (
    attention_backward,
    attention_flops,
    product_flops,
    product_weight,
    range_pairs,
    segment_pairs,
)

ENTRIES = ("forward", "encode")  # by which models call their vision


@dataclass(kw_only=True, slots=True)
class Work:
    """What was computed on this rank.

    Args:
        model: operations that the step needs: forward and wanted gradients, nothing twice.
        hardware: operations that were done: with what checkpointing, attention and loss compute a second time.
        vision: those of `model` that belong to the vision module.
        vision_s: seconds of the vision module's forward passes.
    """

    model: float = 0
    hardware: float = 0
    vision: float = 0
    vision_s: float = 0.0


class FlopMeter:
    """Watch a model's calls between `forward` and `backward`; `take` returns and clears what was counted.

    What attention costs depends on boundaries that lie on the device. They are held, and read in `take`: after the wait
    that ends a step that makes nobody wait once more.

    Args:
        model: watched from now on; make this before ZeRO-3 takes the weights apart.
        vision: the part whose share and time are reported.
    """

    def __init__(self, model: nn.Module, vision: nn.Module | None = None) -> None:
        self._work, self._again, self._counting = Work(), False, False
        self._in_vision = False
        # what is counted on the device -> its number, and the model, hardware and vision operations of one
        self._unread: dict[tuple[Any, ...], tuple[Callable[[], Tensor], list[float]]] = {}
        self._spans: list[tuple[Any, Any]] = []
        self._hooks: list[Any] = []
        for module in model.modules():
            if product_weight(module) is not None:
                self._hooks.append(module.register_forward_hook(self._product_hook(module)))
        self._vision = vision
        self._own = {name: vars(vision)[name] for name in ENTRIES if vision is not None and name in vars(vision)}
        for name in ENTRIES:  # not by hooks: MLLM calls `forward`, and what compressors look into is called by `encode`
            if (entry := getattr(vision, name, None)) is not None:
                setattr(vision, name, self._timed(entry))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Count what runs inside as a forward pass whose gradients follow; without gradients as that alone."""
        with self._phase(again=False):
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Count what runs inside as computed again; gradients were counted in `forward`."""
        with self._phase(again=True):
            yield

    @contextmanager
    def _phase(self, again: bool) -> Iterator[None]:
        self._again, self._counting = again, True
        try:
            with watched(self._operator):
                yield
        finally:
            self._counting = False

    def take(self) -> Work:
        """Return what was counted since the last time; call it when the device has been waited for."""
        work, self._work = self._work, Work()
        if self._unread:
            counts = torch.stack([number() for number, _ in self._unread.values()]).tolist()
            for count, (_, (model, hardware, vision)) in zip(counts, self._unread.values(), strict=True):
                work.model += count * model
                work.hardware += count * hardware
                work.vision += count * vision
        work.vision_s = sum(
            end - start if isinstance(start, float) else start.elapsed_time(end) / 1000 for start, end in self._spans
        )
        self._unread, self._spans = {}, []
        return work

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._vision is not None:
            for name in ENTRIES:
                vars(self._vision).pop(name, None)
            vars(self._vision).update(self._own)
            self._vision = None

    def _cost(self, flops: float, model: float, hardware: float) -> tuple[float, float, float]:
        """Return model, hardware and vision operations of a product.

        Args:
            flops: of its forward pass.
            model, hardware: of its gradients, those that are needed and those that are done, in forward passes.
        """
        if self._again:
            return 0.0, flops, 0.0
        learning = torch.is_grad_enabled()
        needed = flops * (1 + model * learning)
        return needed, flops * (1 + hardware * learning), needed * self._in_vision

    def _add(self, flops: float, model: float, hardware: float) -> None:
        for name, value in zip(("model", "hardware", "vision"), self._cost(flops, model, hardware), strict=True):
            setattr(self._work, name, getattr(self._work, name) + value)

    def _add_later(
        self, key: tuple[Any, ...], times: Callable[[], Tensor], flops: float, model: float, hardware: float
    ) -> None:
        """Count a product whose number only the device knows; `times` holds its tensors, so that ids stay theirs."""
        _, total = self._unread.setdefault(key, (times, [0.0, 0.0, 0.0]))
        for at, value in enumerate(self._cost(flops, model, hardware)):
            total[at] += value

    def _product_hook(self, module: nn.Module) -> Callable[..., None]:
        weight, flops = product_weight(module), product_flops(module)

        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if self._counting:
                gradients = wanted(weight) + any(wanted(arg) for arg in args)
                self._add(flops(out), gradients, gradients)

        return hook

    def _operator(self, name: str, args: tuple[Any, ...]) -> None:
        getattr(self, f"_{name}")(*args)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> None:
        key = ("segments", id(cu_q), id(cu_k), causal)
        self._attend(key, lambda: segment_pairs(cu_q, cu_k, causal), q, k, v)

    def _cached_attention(self, q: Tensor, mask: Tensor, rows: Tensor, places: Tensor) -> None:
        def pairs() -> Tensor:
            seen = mask[rows, 0, places]  # (T, L)
            return (seen if seen.dtype == torch.bool else seen > -torch.inf).sum()

        self._add_later(("cached", id(mask)), pairs, attention_flops(q, 1), 0, 0)

    def _cross_attention(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor) -> None:
        num = len(k)
        self._attend(("ranges", id(start), id(stop), num), lambda: range_pairs(start, stop, num), q, k, v)

    def _attend(self, key: tuple[Any, ...], pairs: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
        gradients = attention_backward(wanted(q), wanted(k) or wanted(v))
        self._add_later(key, pairs, attention_flops(q, 1), *gradients)

    def _patch_embed(self, pixels: Tensor, weight: Tensor) -> None:
        gradients = wanted(weight) + wanted(pixels)
        self._add(2 * pixels.numel() * weight.shape[1], gradients, gradients)

    def _gelu_mlp(self, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor) -> None:
        rows = 2 * x.numel() // x.shape[-1]
        into = wanted(x) or wanted(weight1) or wanted(bias1)  # the gradient passes the second product
        for weight, gradients in ((weight1, wanted(x) + wanted(weight1)), (weight2, into + wanted(weight2))):
            self._add(rows * weight.numel(), gradients, gradients)

    def _linear_cross_entropy(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, num_targets: int | None, again: bool
    ) -> None:
        gradients = wanted(hidden) + wanted(weight)
        each, done = 2 * weight.numel(), gradients + (again and gradients > 0)
        if num_targets is not None:
            self._add(num_targets * each, gradients, done)
        else:
            key = ("labels", id(labels), ignore_index)
            self._add_later(key, lambda: (labels != ignore_index).sum(), each, gradients, done)

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._counting or self._again or self._in_vision:
                return forward(*args, **kwargs)
            start, self._in_vision = _now(), True
            try:
                return forward(*args, **kwargs)
            finally:
                self._in_vision = False
                self._spans.append((start, _now()))

        return timed


def wanted(tensor: Any) -> bool:
    """Tell whether a gradient of this argument is wanted."""
    return isinstance(tensor, Tensor) and tensor.requires_grad


def _now() -> Any:
    """Return the time, of the device: an event there, seconds on a CPU."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
