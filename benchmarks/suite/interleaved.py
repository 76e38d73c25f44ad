"""Times of several calls side by side in one process, what their ratios say, and where they were measured."""

from __future__ import annotations

import copy
import functools
import math
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from fastmllm.session import environment

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAST = 6  # rounds of which the smallest and the largest hold the median with 95 %


def seconds(call: Callable[[], Any]) -> float:
    """Return process CPU time on one thread, or time on the GPU."""
    if DEVICE == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def twin(model: Any) -> Any:
    """Return a copy that shares its weights: where copies of those lie in memory would be timed, too."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Return each call's seconds in each round; a round has an order of its own, and one round is not counted."""
    order, names = random.Random(seed), list(calls)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            took = seconds(calls[name])
            if turn:
                times[name].append(took)
    return times


def compared(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Return the median of the paired ratios before / after, and the interval that holds it with 95 %.

    The interval is that of order statistics: it asks nothing of how times are distributed. Below `LEAST` rounds it is
    all there is, which is less than 95 %.
    """
    ratios = sorted(a / b for a, b in zip(before, after, strict=True))
    count, rank, tail = len(ratios), 0, 0.0
    while rank < count // 2 and (tail := tail + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    rank = max(rank, 1)
    return {"value": median(ratios), "low": ratios[rank - 1], "high": ratios[count - rank]}


def verdict(ratio: Mapping[str, float], noise: Mapping[str, float]) -> str:
    """Say whether a ratio is told apart from what the unpatched model has over itself: its interval does not meet
    that one's, nor 1."""
    if ratio["high"] < min(noise["low"], 1.0):
        return "slower"
    return "faster" if ratio["low"] > max(noise["high"], 1.0) else "as fast"


@functools.cache
def circumstances() -> dict[str, Any]:
    """Return what a row says about where and of what it was measured; the commit is that of the process's start."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    return environment() | {"transformers": transformers.__version__, "commit": said}
