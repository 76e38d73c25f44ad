"""What `fastmllm.patch(model, compress=…)` saves of what the kept tokens promise.

    python benchmarks/suite/dropin_compress.py [METHOD ...] [--rounds N]

A LLaVA of CLIP-B/16's width (224 px: 196 tokens; frozen, 4 of 12 layers) and SmolLM2-135M's (8 of 30), one image and 32
words of which half are scored. First token and training step: unpatched, patched without compression (`whole`), patched
with it (`compressed`), and `free`: the model patched without compression, whose layers are handed, by a slice, as many
rows as the same layer of the compressed model hands on. `realised` is whole / compressed, `promised` whole / free, the
medians of paired ratios of all methods in turns of one process, each round in an order of its own; `share` is realised
over promised, free / compressed. On a CPU it is process CPU time on one thread. Writes
benchmarks/results/<device>/dropin_compress.json, beside the rows of other methods, each with where it was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from interleaved import DEVICE, LEAST, ROOT, circumstances, compared, in_turns, twin
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fastmllm.compression import Placement, TopK
from fastmllm.hf import patch, relevance
from fastmllm.session import write_text

IMAGE, SIDE, WHOLE, TEXT, DEPTH = 49000, 224, 196, 32, 8
MODEL = f"CLIP-B/16's width, 4 of 12 layers, SmolLM2-135M's, {DEPTH} of 30, {WHOLE} visual tokens and {TEXT} of text"
GOAL = 0.95  # of what is promised
METHODS: dict[str, str | Placement] = {  # two of them between layers as published, moved from 32 layers to 8
    "divprune:64": "divprune:64", "visionzip:64": "visionzip:64", "cdpruner:64": "cdpruner:64", "grid:64": "grid:64",
    "tome:64": "tome:64", "fastv:0.25": "fastv:0.25", "dart:64": "dart:64",
    "PyramidDrop": Placement.of("language:2/4/6", TopK, (0.5, 0.25, 0.125), scorer="last_row"),
    "SparseVLM": Placement.of("language:1/2/4", TopK, (96, 64, 32), scorer="text_rows"),
}  # fmt: skip


def llava() -> Any:
    """Return the model, its tower frozen."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=12, image_size=SIDE,
                patch_size=16,
            ),
            text_config=LlamaConfig(
                vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=DEPTH,
                num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
            ),
            image_token_id=IMAGE,
        )
    )  # fmt: skip
    model.model.vision_tower.requires_grad_(False)
    return model


def batch(tokens: int) -> dict[str, Tensor]:
    """Return a row of some visual tokens and text, half of it scored."""
    ids = torch.cat([torch.full((tokens,), IMAGE), torch.arange(100, 100 + TEXT)])[None]
    labels = torch.full_like(ids, -100)
    labels[:, -TEXT // 2 :] = ids[:, -TEXT // 2 :]
    return {"input_ids": ids.to(DEVICE), "labels": labels.to(DEVICE)}


def run(model: Any, given: dict[str, Tensor], step: bool) -> None:
    """Take a training step's forward and backward, or compute the first token."""
    model.train(step)
    if not step:
        with torch.no_grad():
            model(**{k: v for k, v in given.items() if k != "labels"}, use_cache=True, logits_to_keep=1)
        return
    model.zero_grad(set_to_none=True)
    model(**given).loss.backward()


def parts(model: Any) -> list[nn.Module]:
    """Return what works on rows of tokens, in order: layers of the tower, projector, layers of the language model."""
    tower = next(m for m in model.model.vision_tower.modules() if hasattr(m, "layers")).layers
    return [*tower, model.model.multi_modal_projector, *model.model.language_model.layers]


def rows_of(model: Any, call: Callable[[], Any]) -> list[int]:
    """Return how many rows each part of a model hands on."""
    seen: dict[nn.Module, int] = {}

    def look(module: nn.Module, args: Any, out: Any) -> None:
        seen[module] = (out if isinstance(out, Tensor) else out[0]).shape[-2]

    hooks = [part.register_forward_hook(look) for part in parts(model)]
    call()
    for hook in hooks:
        hook.remove()
    return [seen[part] for part in parts(model)]


def free(model: Any, rows: list[int]) -> Any:
    """Let each part of a model work on the last of its rows alone."""

    def cut(module: nn.Module, args: Any, kwargs: Any, rows: int) -> Any:
        def last(value: Any) -> Any:
            if isinstance(value, tuple):  # of positions: cosine, sine
                return tuple(map(last, value))
            return value[..., -rows:, :] if isinstance(value, Tensor) and value.is_floating_point() else value

        short = {k: v[..., -rows:] if k == "position_ids" else last(v) for k, v in kwargs.items()}
        return tuple(map(last, args)), short

    for part, n in zip(parts(model), rows, strict=True):
        part.register_forward_pre_hook(lambda m, a, k, n=n: cut(m, a, k, n), with_kwargs=True)
    return model


def calls_of(plain: Any, method: str, pixels: Tensor, step: bool) -> tuple[dict[str, Callable[[], Any]], Any]:
    """Return what runs a method, and what runs its promise; and what is to be said of it."""
    short, ideal = twin(plain), twin(plain)
    report = patch(short, METHODS[method])
    patch(ideal)
    given = {**batch(WHOLE), "pixel_values": pixels}
    scores = torch.arange(WHOLE, device=DEVICE).sin()

    def compressed(step: bool = step) -> None:
        with relevance(short, scores) if method.startswith("cdpruner") else nullcontext():
            run(short, given, step)

    rows = rows_of(short, lambda: compressed(False))
    free(ideal, rows)
    fewer = {**batch(min(WHOLE, rows[-DEPTH - 1])), "pixel_values": pixels}
    fewer["labels"] = fewer["labels"][:, -rows[-1] :]  # of the rows that the head sees
    said = sorted({r.backend for r in report.rows if r.op == "compress" and r.backend})
    return {"compressed": compressed, "free": lambda: run(ideal, fewer, step)}, {"said": said, "rows": rows}


def measure(methods: Sequence[str], dtype: torch.dtype, step: bool, rounds: int) -> list[dict[str, Any]]:
    """Time first token or step of some methods, all in turns."""
    plain = llava().to(DEVICE, dtype)
    whole = twin(plain)
    patch(whole)
    pixels = torch.randn(1, 3, SIDE, SIDE).to(DEVICE, dtype)
    given = {**batch(WHOLE), "pixel_values": pixels}
    calls = {"unpatched": lambda: run(plain, given, step), "whole": lambda: run(whole, given, step)}
    facts = {}
    for method in methods:
        own, facts[method] = calls_of(plain, method, pixels, step)
        calls |= {f"{name} {method}": call for name, call in own.items()}
    times = in_turns(calls, rounds)
    out = []
    for method in methods:
        own = {name: times[name] for name in ("unpatched", "whole")}
        own |= {name: times[f"{name} {method}"] for name in ("compressed", "free")}
        ratios = {
            name: compared(own[a], own[b])
            for name, a, b in (
                ("patched", "unpatched", "whole"), ("realised", "whole", "compressed"), ("promised", "whole", "free"),
                ("share", "free", "compressed"),
            )
        }  # fmt: skip
        out.append({
            "method": method, "what": "step" if step else "first token", "dtype": str(dtype).removeprefix("torch."),
            "model": MODEL, **facts[method], "rounds": rounds, "goal": GOAL, "run": circumstances(),
            "ms": {name: 1e3 * median(t) for name, t in own.items()}, **ratios,
        })  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}; all without")
    parser.add_argument("--rounds", type=int, default=LEAST)
    options = parser.parse_args()
    if unknown := set(options.methods) - set(METHODS):
        sys.exit(f"dropin_compress.py: {sorted(unknown)} are none of {sorted(METHODS)}")
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    circumstances()  # of the code before this run writes its results
    methods = options.methods or list(METHODS)
    path = ROOT / "benchmarks" / "results" / DEVICE / "dropin_compress.json"
    stored = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [row for dtype in (torch.float32, torch.bfloat16) for step in (False, True)
            for row in measure(methods, dtype, step, options.rounds)]  # fmt: skip
    kept = [r for r in stored if r["method"] not in methods and r["method"] in METHODS]
    order = list(METHODS)
    write_text(path, json.dumps({"rows": sorted(kept + rows, key=lambda r: order.index(r["method"]))}, indent=1))
    table = Table(
        title="patch(compress=): ms, and how much faster; " + ("CUDA" if DEVICE == "cuda" else "one CPU thread")
    )
    for name in ("method", "what", "dtype", "unpatched", "whole", "compressed", "realised", "promised", "share", ""):
        table.add_column(name, justify="left" if name == "method" else "right")
    for r in rows:
        share = r["share"]
        table.add_row(
            r["method"], r["what"], r["dtype"], *(f"{r['ms'][n]:.0f}" for n in ("unpatched", "whole", "compressed")),
            f"{r['realised']['value']:.2f}", f"{r['promised']['value']:.2f}",
            f"{share['value']:.2f} ({share['low']:.2f}-{share['high']:.2f})", "" if share["high"] >= GOAL else "short",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
