"""`fastmllm.patch` on models of transformers at real widths: unpatched, torch.compile, Liger (on CUDA) and patched.

    python benchmarks/suite/dropin.py [NAME ...] [--rounds N] [--warm]

Random weights, the published widths, fewer layers and tokens where a case says so. All providers of a case run in turns
in one process, each round in an order of its own; the figure is the median of paired ratios unpatched / patched: above
1 the patch is faster. A second copy of the unpatched model runs in the same turns: the interval of its ratio is the
noise, and a row is called slower or faster where the patch's interval meets neither that nor 1. On a CPU it is process
CPU time on one thread, on a GPU the time between events. Results are compared before anything is timed. Where
torch.compile fails or breaks its graph the row says why. `--warm` only fills torch.compile's cache, which takes longer
than the rest. Writes benchmarks/results/<device>/dropin.json, a case at a time, each row with where it was measured,
beside the cases that are stored there.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from dropin_cases import CASES, Case
from interleaved import DEVICE, ROOT, circumstances, compared, in_turns, twin, verdict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from fastmllm.bench.meters import peak_bytes
from fastmllm.hf import patch
from fastmllm.session import write_text


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


def compiled(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[nn.Module | None, str]:
    """Return a model under torch.compile that has run twice, or None, and what is to be said of it."""
    torch._dynamo.reset()
    counters.clear()
    fast: nn.Module = torch.compile(model)  # type: ignore[assignment]
    try:
        for _ in range(2):
            run(fast)
    except Exception as error:
        return None, f"fails: {type(error).__name__}: {_line(str(error))}"
    breaks = [_line(why) for why in counters["graph_break"]]
    graphs = counters["stats"]["unique_graphs"]
    return fast, f"{graphs} graphs: {'; '.join(breaks)}" if breaks else f"{graphs} graph" + "s" * (graphs != 1)


def _line(said: str) -> str:
    """Return the first line of what torch says, without what stands around it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[0][:100] if lines else "no reason given"


def measure(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Compare and time the providers of a case; no round: only compile."""
    torch.manual_seed(0)
    plain = case.build().to(DEVICE, dtype)
    plain.train(case.step)
    if case.step:
        case.freeze(plain)
    patched = twin(plain)
    report = patch(patched)
    given = case.inputs(DEVICE, dtype)

    def run(model: nn.Module) -> Any:
        if not case.step:
            with torch.no_grad():
                return case.call(model, given)
        model.zero_grad(set_to_none=True)
        loss = case.call(model, given)
        loss.backward()
        return loss

    models: dict[str, nn.Module] = {"unpatched": plain, "patched": patched, "unpatched again": twin(plain)}
    fast, said = compiled(twin(plain), run)
    if fast is not None:
        models["torch.compile"] = fast
    if DEVICE == "cuda" and (lighter := liger(twin(plain))) is not None:
        models["liger"] = lighter
    found: dict[str, Any] = {}
    peaks: dict[str, float] = {}
    for name in (n for n in models if n not in ("torch.compile", "unpatched again")):
        plain.zero_grad(set_to_none=True)
        found[name] = run(models[name]), gradients(plain)
    for name in found:  # again: what is kept from call to call is there
        plain.zero_grad(set_to_none=True)
        peaks[name] = peak_bytes(lambda n=name: run(models[n])) / 2**20
    error = max(differ(*pair) for pair in zip(found["patched"], found["unpatched"], strict=True) if tree_leaves(pair))
    if not error <= (2e-4 if dtype == torch.float32 else 0.06):
        raise SystemExit(f"{case.name}: patched and unpatched differ by {error}")
    found.clear()
    plain.zero_grad(set_to_none=True)
    row = {
        "case": case.name, "what": case.what, "dtype": str(dtype).removeprefix("torch."), "goal": case.goal,
        "error": error, "replaced": sorted({f"{r.op} ({r.backend})" for r in report.replaced}),
        "compile": said, "peak_mib": peaks, "rounds": rounds, "run": circumstances(),
    }  # fmt: skip
    if not rounds:
        return row
    times = in_turns({name: (lambda m=model: run(m)) for name, model in models.items()}, rounds)
    ratio = {name: compared(t, times["patched"]) for name, t in times.items() if name != "patched"}
    noise = compared(times["unpatched"], times["unpatched again"])
    del ratio["unpatched again"]
    return row | {
        "ms": {name: 1e3 * median(t) for name, t in times.items()}, "ratio": ratio, "noise": noise,
        "verdict": verdict(ratio["unpatched"], noise),
    }  # fmt: skip


def store(rows: list[dict[str, Any]]) -> Path:
    """Write rows beside those of other cases."""
    path = ROOT / "benchmarks" / "results" / DEVICE / "dropin.json"
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    done = {(r["case"], r["dtype"]) for r in rows}
    kept = [r for r in before if (r["case"], r["dtype"]) not in done and r["case"] in CASES]
    order = {name: n for n, name in enumerate(CASES)}
    both = sorted(kept + rows, key=lambda r: (order[r["case"]], r["dtype"]))
    write_text(path, json.dumps({"rows": both}, indent=1))
    return path


def table(rows: list[dict[str, Any]]) -> Table:
    """Return what a reader looks at first."""
    out = Table(
        title="ms, and how much faster the patched model is; " + ("CUDA" if DEVICE == "cuda" else "one CPU thread")
    )
    heads = ("case", "dtype", "unpatched", "compile", "liger", "patched", "ratio", "noise", "", "vs compile", "MiB")
    for name in (*heads, "goal"):
        out.add_column(name, justify="left" if name == "case" else "right")
    for r in rows:
        ms, peak, ratio, noise = r["ms"], r["peak_mib"], r["ratio"], r["noise"]
        out.add_row(
            r["case"], r["dtype"],
            *(f"{ms[n]:.1f}" if n in ms else "" for n in ("unpatched", "torch.compile", "liger", "patched")),
            f"{ratio['unpatched']['value']:.3f}", f"{noise['low']:.3f}-{noise['high']:.3f}", r["verdict"],
            f"{ratio['torch.compile']['value']:.2f}" if "torch.compile" in ratio else r["compile"],
            f"{peak['unpatched']:.0f} → {peak['patched']:.0f}", "" if r["goal"] is None else f"{r['goal']:.2f}",
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--rounds", type=int, default=15, help="at most; a case has its own number")
    parser.add_argument("--warm", action="store_true", help="compile, and time nothing")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CASES):
        sys.exit(f"dropin.py: {sorted(unknown)} are none of {sorted(CASES)}")
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    circumstances()  # of the code before this run writes its results
    console, rows = Console(width=None if sys.stdout.isatty() else 170), []
    for case in (CASES[name] for name in options.names or CASES):
        for dtype in case.dtypes:
            row = measure(case, dtype, 0 if options.warm else min(options.rounds, case.rounds))
            if options.warm:
                console.print(case.name, row["dtype"], row["compile"])
            else:
                rows.append(row)
                path = store(rows)
                console.print(table(rows[-1:]))
            gc.collect()
    if rows:
        console.print(table(rows))
        console.print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
