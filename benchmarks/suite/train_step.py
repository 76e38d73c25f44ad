"""Our trainer against transformers' Trainer with DeepSpeed: one model, the same samples in each step, ZeRO stage 2.

    python benchmarks/suite/train_step.py [NAME ...] [--steps N]

Each side is a process of its own, a rank each, with the model of the same seed: ours loads it from the checkpoint that
transformers writes. The sides take turns step by step, and only one of them works at a time; the figure is the median
of paired ratios Trainer / fastmllm of a step: above 1 ours is faster. On a CPU it is process CPU time, one thread a
rank, with wall time beside; on a GPU wall time. A step goes from data to updated weights. The losses of all steps are
compared. Writes benchmarks/results/<device>/train_step.json, a case at a time, beside the cases that are stored there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from train_step_mix import CASES, Case, Samples, padding, samples
from train_step_sides import run

from fastmllm.session import environment, write_text

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = "cpu" if DEVICE == "cpu" else "wall"
GOAL = 1.5 if DEVICE == "cpu" else 1.3
SAME = {"float32": 1e-3, "bfloat16": 0.05}  # losses, of whole runs
SAME_START = {"float32": 1e-4, "bfloat16": 0.02}  # the first step's, of equal weights
PATIENCE = 900  # seconds for a step, on a machine that does other work too

Step = dict[str, Any]


class Side:
    """The ranks of one provider.

    Args:
        provider: of the case.
        case: what is trained.
        data: of all steps.
        folder: for what the ranks print.
    """

    def __init__(self, provider: str, case: Case, data: Samples, folder: Path) -> None:
        self.provider, self._logs = provider, [folder / f"{provider}-{rank}.txt" for rank in range(case.ranks)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank, log in enumerate(self._logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            mine, its = context.Pipe()
            process = context.Process(target=run, args=(provider, case, data, its, own, str(log)), daemon=True)
            process.start()
            its.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def start(self) -> None:
        """Let a step begin."""
        for pipe in self._pipes:
            pipe.send(True)

    def took(self) -> Step:
        """Return what the step took: the slowest rank's wall time, the CPU time and memory of all.

        Raises:
            SystemExit: a rank ended, or is silent for longer than `PATIENCE`; with what it printed.
        """
        ranks = []
        for pipe, log in zip(self._pipes, self._logs, strict=True):
            try:
                if not pipe.poll(PATIENCE):
                    raise EOFError
                ranks.append(pipe.recv())
            except (EOFError, OSError):
                said = log.read_text(errors="replace")[-4000:] if log.exists() else ""
                sys.exit(f"train_step.py: {self.provider} ended, or took more than {PATIENCE} s; it said:\n{said}")
        first = dict(ranks[0])
        return first | {
            "loss": sum(r["loss"] for r in ranks) / len(ranks),
            "wall": max(r["wall"] for r in ranks), "cpu": sum(r["cpu"] for r in ranks),
            "peak": max(r["peak"] for r in ranks),
        }  # fmt: skip

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
            process.join()


def train(case: Case, data: Samples) -> dict[str, list[Step]]:
    """Return what each step took, by provider; the first one begins with making the engine."""
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(provider, case, data, Path(folder)) for provider in case.providers]
        try:
            steps: dict[str, list[Step]] = {side.provider: [] for side in sides}
            for number in range(len(data) // case.samples):
                turn = number % len(sides)
                for side in [*sides[turn:], *sides[:turn]]:
                    side.start()
                    steps[side.provider].append(side.took())
            return steps
        finally:
            for side in sides:
                side.close()


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Train a case on all sides, and compare.

    Args:
        case: what is trained.
        steps: that are timed; two more come before.
    """
    data = samples(case, steps + 2)
    found = train(case, data)
    ours = found["fastmllm"]
    differences = {
        name: [abs(a["loss"] - b["loss"]) for a, b in zip(ours, its, strict=True)]
        for name, its in found.items() if name != "fastmllm"
    }  # fmt: skip
    for name, apart in differences.items():
        if not (apart[0] <= SAME_START[case.dtype] and max(apart) <= SAME[case.dtype]):
            sys.exit(f"train_step.py: {case.name}: the losses of fastmllm and {name} differ by {apart}")
    timed = {name: its[2:] for name, its in found.items()}
    row: dict[str, Any] = {
        "case": case.name, "what": case.what, "dtype": case.dtype, "ranks": case.ranks, "order": case.order,
        "samples_a_step": case.samples, "steps": steps, "zero_stage": 2, "goal": GOAL,
        "tokens_a_step": median(s["tokens"] for s in timed["fastmllm"]),
        "scored": sum(s["targets"] for s in ours) / sum(s["tokens"] for s in ours),
        "padding": {
            name: padding(case, data) if name != "fastmllm" else median(s["padding"] for s in its)
            for name, its in timed.items()
        },
        "losses": {name: [s["loss"] for s in its] for name, its in found.items()},
        "loss_difference": {name: max(apart) for name, apart in differences.items()},
        "seconds": {name: {clock: [s[clock] for s in its] for clock in ("cpu", "wall")} for name, its in timed.items()},
        "samples_per_s": {name: case.samples / median(s[CLOCK] for s in its) for name, its in timed.items()},
        "model_tflops": {
            name: median(a["model_tflop"] / b[CLOCK] for a, b in zip(timed["fastmllm"], its, strict=True))
            for name, its in timed.items()
        },
        "peak_mib": {name: its[-1]["peak"] / 2**20 for name, its in found.items()},
    }  # fmt: skip
    row["ratio"] = {name: ratio(its, timed["fastmllm"], CLOCK) for name, its in timed.items() if name != "fastmllm"}
    row["wall_ratio"] = {
        name: ratio(its, timed["fastmllm"], "wall") for name, its in timed.items() if name != "fastmllm"
    }
    if (peak := ours[0]["peak_tflops"]) is not None:
        row["mfu"] = {name: rate / (peak * case.ranks) for name, rate in row["model_tflops"].items()}
    return row


def ratio(theirs: Sequence[Step], ours: Sequence[Step], clock: str) -> float:
    """Return the median of paired ratios."""
    return median(a[clock] / b[clock] for a, b in zip(theirs, ours, strict=True))


def commit() -> str:
    """Return what is measured; "+" where files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=9"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip()


def store(row: Mapping[str, Any]) -> Path:
    """Write a row beside those of other cases."""
    path = ROOT / "benchmarks" / "results" / DEVICE / "train_step.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    order = {name: n for n, name in enumerate(CASES)}
    kept = [r for r in before if r["case"] != row["case"]]
    both = sorted([*kept, row], key=lambda r: order.get(r["case"], 99))
    write_text(path, json.dumps({"environment": environment(), "rows": both}, indent=1))
    return path


def table(row: Mapping[str, Any]) -> Table:
    """Return what a reader looks at first."""
    out = Table(title=f"{row['case']}: {row['what']}; {row['ranks']} rank(s), {row['dtype']}")
    for name in ("provider", "samples/s", "s a step", "wall s", "ratio", "MiB", "padding", "GFLOP/s", "MFU", "loss"):
        out.add_column(name, justify="left" if name == "provider" else "right")
    for name, seconds in row["seconds"].items():
        out.add_row(
            name, f"{row['samples_per_s'][name]:.2f}", f"{median(seconds[CLOCK]):.2f}",
            f"{median(seconds['wall']):.2f}", f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "",
            f"{row['peak_mib'][name]:.0f}",
            f"{row['padding'][name]:.1%}", f"{1000 * row['model_tflops'][name]:.0f}",
            f"{row['mfu'][name]:.1%}" if "mfu" in row else "", f"{row['losses'][name][-1]:.5f}",
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CASES):
        sys.exit(f"train_step.py: {sorted(unknown)} are none of {sorted(CASES)}")
    console = Console(width=None if sys.stdout.isatty() else 150)
    measured = commit()  # before results are written, which are no difference
    for case in (CASES[name] for name in options.names or CASES):
        row = measure(case, options.steps) | {"commit": measured}
        path = store(row)
        console.print(table(row))
    console.print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
