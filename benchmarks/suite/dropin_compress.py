"""What `fastmllm.patch(model, compress=…)` saves of what the kept tokens promise.

    python benchmarks/suite/dropin_compress.py [--rounds N] [--layers N]

LLaVA-OneVision-0.5B's widths (`dropin_cases.llava`; a frozen tower of 4 of 27 layers), one image of 729 tokens of which
K stay, 64 tokens of text of which half are scored. `realised` is the patched model without compression over the one
with it, first token and training step, the median of paired ratios; `promised` is what it would be if compression cost
nothing: the tower as it is, and projector, language model, head and loss on K tokens, timed on embeddings in the same
turns. On a CPU it is process CPU time on one thread. Writes benchmarks/results/<device>/dropin_compress.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from dropin import DEVICE, seconds
from dropin_cases import IMAGE, freeze_tower, llava
from rich.console import Console
from rich.table import Table

from fastmllm.hf import patch
from fastmllm.session import environment, write_text

ROOT = Path(__file__).parents[2]
WHOLE, TEXT = 729, 64
METHODS = ("divprune:64", "divprune:256", "grid:64")


def batch(tokens: int) -> dict[str, Any]:
    """Return a row of some visual tokens and text, half of it scored."""
    ids = torch.cat([torch.full((tokens,), IMAGE), torch.arange(100, 100 + TEXT)])[None]
    labels = torch.full_like(ids, -100)
    labels[:, -TEXT // 2 :] = ids[:, -TEXT // 2 :]
    return {name: t.to(DEVICE) for name, t in
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}.items()}  # fmt: skip


def run(model: Any, given: dict[str, Any], step: bool) -> None:
    """Take a training step's forward and backward, or compute the first token."""
    model.train(step)
    if not step:
        with torch.no_grad():
            model(**{k: v for k, v in given.items() if k != "labels"}, use_cache=True, logits_to_keep=1)
        return
    model.zero_grad(set_to_none=True)
    model(**given).loss.backward()


def rest(model: Any, tokens: int, step: bool) -> Callable[[], None]:
    """Return what runs everything behind the tower on some visual tokens."""
    given, width = batch(tokens), model.config.vision_config.hidden_size
    features = torch.randn(1, tokens, width, device=DEVICE, dtype=model.dtype)

    def call() -> None:
        with torch.set_grad_enabled(step):
            ids = given["input_ids"]
            projected = model.model.multi_modal_projector(features)
            embeddings = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], projected)
        run(model, {**given, "input_ids": None, "inputs_embeds": embeddings}, step)

    return call


def measure(method: str, dtype: torch.dtype, layers: int, rounds: int) -> list[dict[str, Any]]:
    """Time first token and step of one method."""
    torch.manual_seed(0)
    plain = llava(layers).to(DEVICE, dtype)
    freeze_tower(plain)
    short = copy.deepcopy(plain)
    patch(plain)
    report = patch(short, method)
    keep = int(method.partition(":")[2])
    pixels = torch.randn(1, 3, 384, 384).to(DEVICE, dtype)
    given, out = {**batch(WHOLE), "pixel_values": pixels}, []
    for step in (False, True):
        calls: dict[str, Callable[[], Any]] = {
            "whole": lambda s=step: run(plain, given, s), "compressed": lambda s=step: run(short, given, s),
            "rest of all": rest(plain, WHOLE, step), "rest of K": rest(plain, keep, step),
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 1):
            for name, call in calls.items():
                took = seconds(call)
                if turn:
                    times[name].append(took)
        whole = times["whole"]
        realised = median(a / b for a, b in zip(whole, times["compressed"], strict=True))
        promised = median(
            a / (a - b + c) for a, b, c in zip(whole, times["rest of all"], times["rest of K"], strict=True)
        )
        out.append({
            "method": method, "said": next(r.backend for r in report.rows if r.op == "compress"), "keep": keep,
            "what": "step" if step else "first token", "dtype": str(dtype).removeprefix("torch."), "layers": layers,
            "ms": {name: 1e3 * median(t) for name, t in times.items()}, "realised": realised, "promised": promised,
            "share": realised / promised, "rounds": rounds,
        })  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    rows = [row for dtype in (torch.float32, torch.bfloat16) for method in METHODS
            for row in measure(method, dtype, options.layers, options.rounds)]  # fmt: skip
    path = ROOT / "benchmarks" / "results" / DEVICE / "dropin_compress.json"
    write_text(path, json.dumps({"environment": environment(), "rows": rows}, indent=1))
    table = Table(
        title="patch(compress=): ms, and how much faster; " + ("CUDA" if DEVICE == "cuda" else "one CPU thread")
    )
    for name in ("method", "what", "dtype", "whole", "compressed", "realised", "promised", "share"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for r in rows:
        table.add_row(
            r["method"], r["what"], r["dtype"], f"{r['ms']['whole']:.0f}", f"{r['ms']['compressed']:.0f}",
            f"{r['realised']:.2f}", f"{r['promised']:.2f}", f"{r['share']:.2f}",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
