"""The fixture `compare`: check that all providers agree, time them side by side, keep the rows and where they ran.

    pytest benchmarks -o python_files='bench_*.py' -o python_functions='bench_*'

On a GPU a time is the median of CUDA-graph replays with a flushed L2; on a CPU it is the smallest process CPU time of
interleaved rounds on one thread, because wall time says little on a shared machine: `wall_us`, the smallest one, stands
beside it in newer rows and decides nothing. `ratio` is baseline / ours. An operator's json is written with each case.
"""

from __future__ import annotations

import functools
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import Tensor

CUDA = torch.cuda.is_available()
ROOT = Path(__file__).resolve().parent
ROWS = pytest.StashKey[list[dict[str, Any]]]()
CASES = pytest.StashKey[list[str]]()
BUDGET = 1.0 if CUDA else 0.4  # seconds of timing a provider
functorch_config.donated_buffer = False  # a compiled backward is run many times on one graph


# The machine ----------------------------------------------------------------------------------------------------------
def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


@functools.cache
def _circumstances() -> dict[str, Any]:
    """Return what a row must say about where and with what it was measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    if CUDA:
        device, driver = (
            torch.cuda.get_device_name(),
            _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        )
    else:
        info = Path("/proc/cpuinfo")
        match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
        device, driver = match[1] if match else platform.processor(), platform.release()
    dirty = "+" if _output("git", "status", "--porcelain") else ""
    return {
        "device": device,
        "driver": driver.split("\n")[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _output("git", "rev-parse", "--short", "HEAD") + dirty,
    }


def _folder() -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-") if CUDA else "cpu"
    return ROOT / "results" / slug


@functools.cache
def _peak_bandwidth() -> float:
    """Return the bytes a second of a stream copy."""
    source = torch.empty(1 << (30 if CUDA else 27), dtype=torch.uint8, device="cuda" if CUDA else "cpu").fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / _times({"copy": lambda: target.copy_(source)})["copy"]["seconds"]


@functools.cache
def _peak_flops(dtype: torch.dtype) -> float:
    """Return the operations a second of a large matrix product."""
    n = 8192 if CUDA else 1024
    a, b = (torch.randn(n, n, device="cuda" if CUDA else "cpu").to(dtype) for _ in range(2))
    return 2 * n**3 / _times({"matmul": lambda: a @ b})["matmul"]["seconds"]


# Timing ---------------------------------------------------------------------------------------------------------------
def _times(calls: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
    return {name: _time_cuda(call) for name, call in calls.items()} if CUDA else _time_cpu(calls)


def _time_cpu(calls: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
    """Time in turns, so that a busy moment of the machine meets every provider."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    walls = dict.fromkeys(calls, float("inf"))
    start = time.process_time()
    while len(samples[next(iter(calls))]) < 100:
        for name, call in calls.items():
            begin, before = time.perf_counter(), time.process_time()
            call()
            samples[name].append(time.process_time() - before)
            walls[name] = min(walls[name], time.perf_counter() - begin)
        if time.process_time() - start > BUDGET * len(calls) and len(samples[name]) >= 3:
            break
    return {name: _summary(times, min(times)) | {"wall_us": 1e6 * walls[name]} for name, times in samples.items()}


def _time_cuda(call: Callable[[], object]) -> dict[str, Any]:
    """Time replays of a CUDA graph, each on a cold L2; events around the call where it cannot be captured."""
    flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    replay, captured = call, False
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        replay, captured = graph.replay, True
    except RuntimeError:
        torch.cuda.synchronize()
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < 10 or (len(samples) < 200 and time.perf_counter() - start < BUDGET):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    host = []
    for _ in range(20):
        torch.cuda.synchronize()
        before = time.perf_counter()
        call()
        host.append(time.perf_counter() - before)
    torch.cuda.synchronize()
    return _summary(samples, statistics.median(samples)) | {"host_us": 1e6 * statistics.median(host), "graph": captured}


def _summary(samples: list[float], seconds: float) -> dict[str, Any]:
    ordered = sorted(samples)
    quantile = {q: ordered[min(len(ordered) - 1, int(q / 100 * len(ordered)))] for q in (20, 50, 80)}
    return {"seconds": seconds, "rounds": len(samples), **{f"p{q}_us": 1e6 * t for q, t in quantile.items()}}


def _peak_memory(call: Callable[[], object]) -> int:
    """Return the most bytes that a call holds beyond what was there before."""
    if CUDA:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# What is compared -----------------------------------------------------------------------------------------------------
def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _bind(provider: Callable[..., Any], inputs: Sequence[Tensor] | None, mode: str) -> Callable[[], list[Tensor]]:
    """Return a call without arguments that computes outputs (forward), gradients (backward) or both (full)."""
    if inputs is None:
        return lambda: _tensors(provider())
    leaves = [t for t in inputs if t.requires_grad]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return _tensors(provider(*inputs))

    if mode == "forward":
        return forward
    seeds = [torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape).to(t.dtype) + 0.1 for t in forward()]

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(outputs, leaves, seeds, retain_graph=True))

    if mode == "backward":
        outputs: list[Tensor] = []

        def backward() -> list[Tensor]:
            if not outputs:  # on the stream that will capture it
                outputs.extend(_tensors(provider(*inputs)))
            return gradients(outputs)

        return backward

    def full() -> list[Tensor]:
        results = _tensors(provider(*inputs))
        return [*results, *gradients(results)]

    return full


def _errors(results: Mapping[str, list[Tensor]], truth: list[Tensor]) -> dict[str, float]:
    """Return each provider's largest error, relative to the largest true value of the same output."""
    errors = {}
    for name, tensors in results.items():
        assert [t.shape for t in tensors] == [t.shape for t in truth], f"{name} returns other shapes"
        errors[name] = max(
            ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
            for a, b in zip(tensors, truth, strict=True)
            if b.numel()
        )
    return errors


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    if not CUDA:
        torch.set_num_threads(1)


@pytest.fixture
def compare(benchmark, request):
    """Check that providers agree, then time them; the first one is ours."""

    def run(
        *,
        op: str,
        case: str,
        mode: str,
        providers: Mapping[str, Callable[..., Any]],
        bytes: int = 0,
        flops: int = 0,
        inputs: Sequence[Tensor] | None = None,
        oracle: Callable[..., Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Measure one case.

        Args:
            op: the operator.
            case: shapes and dtype in words; with op, mode and provider it names the row.
            mode: "forward", "backward" or "full" (both).
            providers: name -> callable, ours first. Without `inputs` it is called without arguments and timed as it is.
            bytes: the least memory traffic of the case.
            flops: its arithmetic.
            inputs: arguments of the providers; then the mode decides what is differentiated and timed.
            oracle: the same in fp64: called with `inputs` in fp64, or without arguments.

        Returns:
            One row a provider.

        Raises:
            AssertionError: a provider's results differ.
        """
        # dynamo counts variants of a function over the session, and past its limit "torch.compile" would mean eager
        torch._dynamo.reset()
        calls = {name: _bind(provider, inputs, mode) for name, provider in providers.items()}
        results = {name: [t.detach().clone() for t in call()] for name, call in calls.items()}
        ours, *others = results
        half = any(t.dtype in (torch.bfloat16, torch.float16) for t in results[ours])
        limit = 3e-2 if half else 1e-3
        if oracle is not None:
            wide = None if inputs is None else [
                t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs
            ]  # fmt: skip
            errors = _errors(results, _bind(oracle, wide, mode)())
            limit = max([2 * errors[name] for name in others] + [1e-2 if half else 1e-5])
        else:
            errors = _errors({name: results[name] for name in others}, results[ours])
        for name, error in errors.items():
            if oracle is None or name == ours:
                assert error <= limit, f"{op} {case} {mode}: {name} is off by {error:.1e} of the largest value"
        dtype = results[ours][0].dtype if inputs is None else inputs[0].dtype
        del results
        floor = max(bytes / _peak_bandwidth(), flops / _peak_flops(dtype) if flops else 0)
        times = _times(calls)
        rows = []
        for name, call in calls.items():
            seconds = times[name].pop("seconds")
            rows.append({
                "op": op, "case": case, "mode": mode, "provider": name, "us": 1e6 * seconds, **times[name],
                "ratio": 1.0 if name == ours else seconds / (rows[0]["us"] / 1e6), "bytes": bytes, "flops": flops,
                "peak_percent": 100 * floor / seconds, "peak_bandwidth": _peak_bandwidth(),
                "peak_flops": _peak_flops(dtype) if flops else 0.0, "peak_memory": _peak_memory(call),
                "error": errors.get(name), "error_against": "fp64" if oracle is not None else ours, **_circumstances(),
            })  # fmt: skip
        request.config.stash.setdefault(ROWS, []).extend(rows)
        _store(rows)  # at once: a run that is cut off keeps what it measured
        benchmark.extra_info.update(rows[0])

        def finished() -> None:
            calls[ours]()
            if CUDA:
                torch.cuda.synchronize()

        benchmark.pedantic(finished, rounds=3, iterations=1)
        return rows

    return run


# The record -----------------------------------------------------------------------------------------------------------
def _round(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _store(rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the rows of one case in results/<device>/<op>.json."""
    path = _folder() / f"{rows[0]['op']}.json"
    fresh = [{key: _round(value) for key, value in row.items()} for row in rows]
    cases = {(row["case"], row["mode"]) for row in fresh}
    kept = json.loads(path.read_text()) if path.exists() else []
    fresh += [row for row in kept if (row["case"], row["mode"]) not in cases]
    fresh.sort(key=lambda row: (row["case"], row["mode"]))  # stable: ours first in a case
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".tmp")
    written.write_text("[\n" + ",\n".join(json.dumps(row) for row in fresh) + "\n]\n")
    written.replace(path)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[CASES] = [item.nodeid for item in session.items]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print every row of this run, and the cases that an interrupted one left out."""
    ran = {report.nodeid for reports in terminalreporter.stats.values() for report in reports
           if getattr(report, "when", None) == "call" or getattr(report, "skipped", False)}  # fmt: skip
    left_out = [case for case in config.stash.get(CASES, []) if case not in ran]
    if left_out:
        terminalreporter.section("left out")
        terminalreporter.write_line("\n".join(left_out))
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table

    facts = _circumstances()
    table = Table(
        title=f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"
    )
    for name in ("op", "case", "mode", "provider", "time", "baseline / ours", "% of peak", "peak memory", "error"):
        table.add_column(name, justify="left" if name in ("op", "case", "mode", "provider") else "right")
    for row in rows:
        first = row["provider"] == rows[0]["provider"]
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        head = (row["op"], row["case"], row["mode"]) if first else ("", "", "")
        numbers = (
            f"{row['us']:.1f} us",
            f"{row['ratio']:.2f}",
            f"{row['peak_percent']:.0f}",
            f"{row['peak_memory'] / 2**20:.1f} MiB",
        )
        table.add_row(*head, row["provider"], *numbers, error, end_section=False)
    terminalreporter.write_line("")
    Console(width=max(terminalreporter._tw.fullwidth, 140)).print(table)
