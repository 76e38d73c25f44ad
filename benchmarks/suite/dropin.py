"""`fastmllm.patch` on models of transformers at real shapes: unpatched, torch.compile, Liger (on CUDA) and patched.

    python benchmarks/suite/dropin.py [NAME ...] [--rounds N] [--no-compile]

Random weights, the published widths, fewer layers where a case says so. All providers of a case run in turns in one
process; the figure is the median of paired ratios unpatched / patched: above 1 the patch is faster. On a CPU it is
process CPU time on one thread, on a GPU the time between events. Results are compared before anything is timed. Writes
benchmarks/results/<device>/dropin.json, a case at a time, beside the cases that are stored there.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from dropin_cases import CASES, Case
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastmllm.bench.meters import peak_bytes
from fastmllm.hf import patch
from fastmllm.session import environment, write_text

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def differ(found: Any, expected: Any) -> float:
    """Return the largest difference over the largest number."""
    pairs = [(a, b) for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True) if isinstance(b, Tensor)]
    scale = max(float(b.detach().abs().max()) for _, b in pairs)
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs) / scale


def liger(model: nn.Module) -> nn.Module | None:
    """Return the model as Liger speeds it up, or None."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        return None
    _apply_liger_kernel_to_instance(model)
    return model


def measure(case: Case, dtype: torch.dtype, rounds: int, compiled: bool) -> dict[str, Any]:
    """Compare and time the providers of a case."""
    torch.manual_seed(0)
    plain = case.build().to(DEVICE, dtype)
    plain.train(case.step)
    patched = copy.deepcopy(plain)
    report = patch(patched)
    if case.step:
        for model in (plain, patched):
            case.freeze(model)
    models = {"unpatched": plain, "patched": patched}
    if compiled and case.compiles:
        models["torch.compile"] = torch.compile(copy.deepcopy(plain))  # type: ignore[assignment]
    if DEVICE == "cuda" and (lighter := liger(copy.deepcopy(plain))) is not None:
        models["liger"] = lighter
    given = case.inputs(DEVICE, dtype)

    def run(model: nn.Module) -> Any:
        if not case.step:
            with torch.no_grad():
                return case.call(model, given)
        model.zero_grad(set_to_none=True)
        loss = case.call(model, given)
        loss.backward()
        return loss

    error = differ(run(patched), run(plain))
    if case.step:
        error = max(error, differ(gradients(patched), gradients(plain)))
    if not error <= (2e-4 if dtype == torch.float32 else 0.06):
        raise SystemExit(f"{case.name}: patched and unpatched differ by {error}")
    peaks = {
        name: peak_bytes(lambda m=model: run(m)) / 2**20 for name, model in models.items() if name != "torch.compile"
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            took = seconds(lambda m=model: run(m))
            if turn:
                times[name].append(took)
    return {
        "case": case.name, "what": case.what, "dtype": str(dtype).removeprefix("torch."), "goal": case.goal,
        "error": error, "replaced": sorted({f"{r.op} ({r.backend})" for r in report.replaced}),
        "ms": {name: 1e3 * median(t) for name, t in times.items()}, "peak_mib": peaks, "rounds": rounds,
        "ratio": {
            name: median(a / b for a, b in zip(t, times["patched"], strict=True))
            for name, t in times.items() if name != "patched"
        },
    }  # fmt: skip


def store(rows: list[dict[str, Any]]) -> Path:
    """Write rows beside those of other cases."""
    path = ROOT / "benchmarks" / "results" / DEVICE / "dropin.json"
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    done = {(r["case"], r["dtype"]) for r in rows}
    kept = [r for r in before if (r["case"], r["dtype"]) not in done]
    order = {name: n for n, name in enumerate(CASES)}
    both = sorted(kept + rows, key=lambda r: (order.get(r["case"], 99), r["dtype"]))
    write_text(path, json.dumps({"environment": environment(), "rows": both}, indent=1))
    return path


def table(rows: list[dict[str, Any]]) -> Table:
    """Return what a reader looks at first."""
    out = Table(
        title="ms, and how much faster the patched model is; " + ("CUDA" if DEVICE == "cuda" else "one CPU thread")
    )
    for name in ("case", "dtype", "unpatched", "compile", "liger", "patched", "ratio", "vs compile", "MiB", "goal"):
        out.add_column(name, justify="left" if name == "case" else "right")
    for r in rows:
        ms, peak = r["ms"], r["peak_mib"]
        goal = "" if r["goal"] is None else f"{r['goal']:.2f}"
        compiled = r["ratio"].get("torch.compile")
        out.add_row(
            r["case"], r["dtype"],
            *(f"{ms[n]:.1f}" if n in ms else "" for n in ("unpatched", "torch.compile", "liger", "patched")),
            f"{r['ratio']['unpatched']:.2f}", "" if compiled is None else f"{compiled:.2f}",
            f"{peak['unpatched']:.0f} → {peak['patched']:.0f}", goal,
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CASES):
        sys.exit(f"dropin.py: {sorted(unknown)} are none of {sorted(CASES)}")
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    console, rows = Console(width=None if sys.stdout.isatty() else 150), []
    for case in (CASES[name] for name in options.names or CASES):
        for dtype in case.dtypes:
            rows.append(measure(case, dtype, min(options.rounds, case.rounds), not options.no_compile))
            path = store(rows)
            console.print(table(rows[-1:]))
            torch._dynamo.reset()
            gc.collect()
    console.print(table(rows))
    console.print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
