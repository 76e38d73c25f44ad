"""Write docs/results.md from the stored runs: python benchmarks/results_page.py."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
blind = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))["blind"]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
HEAD = """# Results

Every figure comes from a file under `benchmarks/results/`, named beside it; `benchmarks/results_page.py` writes this
page from them. They were measured on two cores of a shared machine: accuracies hold, times are upper bounds.
**Nothing was measured on a GPU yet.**

The prompt template, learning rates and mixtures of the recipe were chosen while looking at Twemoji's drawings, so its
Twemoji figures are a little optimistic for a team that nobody has looked at. Other splits (`data.held_out=…`) are not
measured here.

Wrong image: the same questions with another subject's image. Majority and random: the most frequent and a random
answer of the task's closed set, without a model. Forced choice: the right name is more probable than that of an absent
thing of the same group. CIDEr-D: rare n-grams shared with the references, 0 to 10. CHAIRs, CHAIRi: captions, and
mentioned objects, that are absent; less is better, and who names nothing has none. Unparsed: answers that could not be
read, in %, in the order of the columns; they count as wrong.
"""
GOAL = 0.95  # of what kept tokens promise
PARTS = ("encode", "select", "assemble", "prefill", "total", "decode")
TASKS = {"name": "name", "group": "group", "exists": "forced choice"}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table; a figure comes as it is to be read."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def _share(row: Mapping[str, Any]) -> str:
    e = row["estimate"]
    return f"{100 * e['value']:.0f} [{100 * e['low']:.0f}, {100 * e['high']:.0f}]"


def encoders() -> str:
    """Compare the candidates on one budget."""
    stored = json.loads((RESULTS / "encoders.json").read_text(encoding="utf-8"))
    lines = [
        "## Encoders on the same budget",
        "",
        "`python benchmarks/encoders.py` → `encoders.json`: the demo's data, connector, language model and batches, "
        f"{stored['rows'][0]['steps']} steps in all; % right on Twemoji with the 95 % interval, blind beside it.",
        "",
    ]
    head = ("encoder", "px", "grid tokens", "ms an image", "training, s", *TASKS.values())
    lines += table(head, (
        (row["encoder"], row["image_size"], row["grid_tokens"], f"{row['encoder_ms']:.1f}", f"{row['train_s']:.0f}",
         *(f"{_share(row[t])}, blind {100 * row[f'{t} blind']['estimate']['value']:.0f}" for t in TASKS))
        for row in stored["rows"]
    ))  # fmt: skip
    best = max(stored["rows"], key=lambda r: r["name"]["estimate"]["value"])
    notes = (
        f"The best, {best['encoder'].split(',')[0]}, is the recipe's default. dinov2_small is not DINOv2 as published: "
        "its weights were tuned for saliency, so its layer 10 of 12 is read, at 112 px (8 x 8 patches of 14). "
        + blind(best["name blind"])
    )
    return "\n".join([*lines, "", notes]) + "\n"


def expert() -> str:
    """Set the expert-model path beside the fused model."""
    rows = json.loads((RESULTS / "expert.json").read_text(encoding="utf-8"))["rows"]
    tasks = [key for key in rows[0] if key != "path"]
    lines = [
        "## Expert model: captions in front of a language model",
        "",
        "`python benchmarks/expert.py` → `expert.json`: the demo's model describes each drawing, and a language model "
        "that sees only this description answers; % right on Twemoji.",
        "",
        *table(("path", *tasks), ((row["path"], *(_share(row[t]) for t in tasks)) for row in rows)),
        "",
        "What a description leaves out is lost, and a published language model of this size does not answer in the "
        "words that exact match wants; forced choice shows what reached it.",
    ]
    return "\n".join(lines) + "\n"


def evaluation(title: str, name: str, text: str) -> str:
    """Show a run's whole evaluation."""
    metrics = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    conditions = ("model", "blind", "wrong image", "majority", "random")
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in metrics["evaluation"]:
        found.setdefault((row["task"], row["metric"]), {})[row["condition"]] = row
    text = f"{text} {blind(found['name', 'accuracy']['blind'])}"
    rows = []
    for (task, metric), by in found.items():
        show = _score if metric in ("CIDEr-D", "words") else _share
        unread = " / ".join(
            f"{100 * by[c]['unparsed']:.0f}" for c in conditions if c in by and by[c]["unparsed"] is not None
        )
        cells = (show(by[c]) if c in by else "–" for c in conditions)
        rows.append((task, metric, by["model"]["estimate"]["count"], *cells, unread or "–"))
    lines = [f"## {title}", "", text, "", *table(("task", "metric", "n", *conditions, "unparsed"), rows)]
    seconds = {k: v for k, v in metrics["seconds"].items() if k != "this run"}
    parts = ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
    lines += ["", f"Seconds: {parts}; {sum(seconds.values()):.0f} in all, {metrics['peak_memory_gib']:.1f} GiB; "
              f"{metrics['environment']['threads']} threads, {metrics['precision']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def compression() -> str:
    """What each compressor keeps and costs."""
    stored = json.loads((RESULTS / "compression.json").read_text(encoding="utf-8"))
    whole = stored["rows"][0]
    shares = ", ".join(f"{TASKS[t]} {100 * whole['tasks'][t]['value']:.0f} %" for t in TASKS)
    asked = whole["tasks"]["name"]["count"]
    lines = [
        "## Visual-token compression",
        "",
        "`python benchmarks/compression.py` → `compression.json`: DINOv2-small at 112 px (64 tokens, whitened) before "
        f"SmolLM2, trained on grids pooled to 4, 16, 36 and 64 tokens (whole: {shares}; {asked} questions a task, so a "
        "few % apart is nothing); then every method on the same weights. Kept: the mean over the "
        "three tasks of the share of the whole grid's figure; pooling is what the model was trained with. The rows "
        "without a score are 448 px, 1024 tokens. Times: one picture, one question, ms, medians of "
        f"{len(whole['total_rounds_ms'])} (448 px: {len(stored['rows'][-1]['total_rounds_ms'])}) rounds in turns. "
        "Tax: over a random choice of as many at the same place, where the random rows' own tax is the noise. "
        "Promised: by how much the products of the call shrink at this machine's own rates; realised: by how much the "
        "call does. Trained connectors (`pixel_shuffle`, `conv_reduce`, `attend`) need training of their own, "
        "`temporal_dedup` needs videos: they have no row here.",
        "",
    ]
    rows = []
    for r in stored["rows"]:
        tasks = (f"{100 * r['tasks'][t]['value']:.0f}" if r["tasks"] else "" for t in TASKS)
        kept = f"{100 * r['kept']:.0f} %" if r["tasks"] else ""
        tax = "" if r["tax"] is None else f"{100 * r['tax']:+.1f} %"
        rows.append((
            r["whole"], r["keep"], r["name"], r["mode"], *tasks, kept, *(f"{r[f'{part}_ms']:.1f}" for part in PARTS),
            f"{r['peak_mib']:.0f}", tax, f"{r['realised']:.2f} / {r['promised']:.2f}",
        ))  # fmt: skip
    lines += table(
        ("of", "K", "method", "mode", *TASKS.values(), "kept", "encode", "select", "assemble", "prefill", "sum",
         "decode", "MiB", "tax", "realised / promised"), rows,
    )  # fmt: skip
    selectors = json.loads((RESULTS / "compressors.json").read_text(encoding="utf-8"))
    lines += [
        "",
        "`python benchmarks/compressors.py` → `compressors.json`: CPU ms on one thread of the compressor alone at "
        "CLIP-L/336's size (576 tokens of 1024 to 64) beside a torch transcription of what is published, in turns in "
        "one process; ratio above 1: ours is faster.",
        "",
        *table(
            ("method", "images", "ours", "published", "ratio"),
            (
                (r["method"], r["images"], f"{r['ours_ms']:.2f}", f"{r['published_ms']:.2f}", f"{r['ratio']:.2f}")
                for r in selectors["rows"]
            ),
        ),
    ]
    return "\n".join(lines)


def dropin() -> str:
    """What `fastmllm.patch` gives on models of transformers."""
    stored = json.loads((RESULTS / "dropin.json").read_text(encoding="utf-8"))["rows"]
    lines = [
        "## Drop-in",
        "",
        "`python benchmarks/suite/dropin.py` → `dropin.json`: models of transformers at published widths, unpatched, "
        "under `torch.compile` and patched, in turns of a random order in one process; CPU ms on one thread, medians. "
        "Ratio: unpatched / patched, the median of pairs; noise: the same of the unpatched model over itself, with the "
        "interval that holds its median with 95 %; goal: what was wanted. Slower or faster is a row whose own interval "
        "meets neither that one nor 1. What a CPU does not gain from is left as it is. "
        f"Measured at {_commits(stored)}.",
        "",
    ]
    rows = []
    for r in stored:
        ms, peak = r["ms"], r["peak_mib"]
        graphs = r["compile"].partition(":")[0]
        compiled = f"{ms['torch.compile']:.1f}" if "torch.compile" in ms else graphs
        rows.append((
            f"{r['case']}: {r['what']}", r["dtype"], f"{ms['unpatched']:.1f}",
            compiled + (f" ({graphs})" if ":" in r["compile"] and "torch.compile" in ms else ""),
            f"{ms['patched']:.1f}", f"{r['ratio']['unpatched']['value']:.2f}",
            f"{r['noise']['low']:.2f}–{r['noise']['high']:.2f}: {r['verdict']}" if r["noise"] else "",
            "" if r["goal"] is None else f"{r['goal']:.1f}", f"{peak['unpatched']:.0f} → {peak['patched']:.0f}",
            ", ".join(r["replaced"]),
        ))  # fmt: skip
    head = ("case", "dtype", "unpatched", "torch.compile", "patched", "ratio", "noise", "goal", "MiB", "replaced")
    lines += table(head, rows)
    broken: dict[str, list[str]] = {}
    for r in stored:
        if ":" in r["compile"]:
            broken.setdefault(r["compile"].partition(": ")[2], []).append(f"{r['case']} ({r['dtype']})")
    if broken:
        lines += ["", "Where `torch.compile` fails or breaks its graph, and why:", ""]
        lines += [f"- {', '.join(cases)}: {why}" for why, cases in broken.items()]
    if (RESULTS / "dropin_compress.json").is_file():
        lines += compressed_dropin(json.loads((RESULTS / "dropin_compress.json").read_text(encoding="utf-8"))["rows"])
    return "\n".join(lines) + "\n"


def compressed_dropin(stored: list[dict[str, Any]]) -> list[str]:
    """What `patch(compress=)` saves of what the kept tokens promise."""
    cells = ((r, *(r[name] for name in ("realised", "promised", "share"))) for r in stored)
    return [
        "",
        "`python benchmarks/suite/dropin_compress.py` → `dropin_compress.json`: unpatched, `patch(model)` (whole) and "
        f"`patch(model, compress=…)`, CPU ms on one thread; {'; '.join(dict.fromkeys(r['model'] for r in stored))}. "
        "Realised: whole / compressed; promised: if compressing itself cost nothing, from the tokens that each layer "
        f"has; share of that, of {GOAL} that are wanted, with the interval that holds the median with 95 %. Measured "
        f"at {_commits(stored)}.",
        "",
        *table(
            ("compress", "what", "dtype", "unpatched", "whole", "compressed", "realised", "promised", "share"),
            (
                (
                    r["method"], r["what"], r["dtype"],
                    *(f"{r['ms'][n]:.0f}" if n in r["ms"] else "" for n in ("unpatched", "whole", "compressed")),
                    f"{realised['value']:.2f}", f"{promised['value']:.2f}",
                    f"{share['value']:.2f}" + (f" ({share['low']:.2f}–{share['high']:.2f})" if "low" in share else ""),
                )
                for r, realised, promised, share in cells
            ),
        ),
    ]  # fmt: skip


def _commits(rows: Iterable[Mapping[str, Any]]) -> str:
    """Name the code and software that rows were measured with."""
    runs = (r["run"] for r in rows)
    return "; ".join(dict.fromkeys(f"{r['commit'] or 'a commit that was not noted'}, torch {r['torch']}" for r in runs))


def train_step() -> str:
    """Set our trainer beside transformers' Trainer with DeepSpeed."""
    rows = json.loads((RESULTS / "train_step.json").read_text(encoding="utf-8"))["rows"]
    lines = [
        "## Training step",
        "",
        "`python benchmarks/suite/train_step.py` → `train_step.json`: this trainer and transformers' `Trainer` with "
        f"DeepSpeed, both at ZeRO stage {rows[0]['zero_stage']}, the same weights, optimizer and samples in each step, "
        "a step in turns; a process with one thread for each rank. The mix has LLaVA-1.5's kinds of samples in their "
        f"shares, and some of several images; {100 * rows[0]['scored']:.0f} % of the positions are scored. Ratio: CPU "
        "seconds of the Trainer / ours, the median of pairs; wall: the same of wall time. Needed: operations that the "
        "step needs, a second. Peak: of a process, libraries included. Loss: largest difference to ours of all steps.",
        "",
    ]
    cells = []
    for r in rows:
        for name, rate in r["samples_per_s"].items():
            compared = ("", "", "") if name not in r["ratio"] else (
                f"{r['ratio'][name]:.2f}", f"{r['wall_ratio'][name]:.2f}", f"{r['goal']:.1f}"
            )  # fmt: skip
            cells.append((
                f"{r['case']}: {r['what']}" if name == "fastmllm" else "", r["ranks"], name, f"{rate:.2f}", *compared,
                f"{100 * r['padding'][name]:.0f} %", f"{1000 * r['model_tflops'][name]:.0f}",
                f"{r['peak_mib'][name]:.0f}",
                f"{r['loss_difference'][name]:.0e}" if name in r["loss_difference"] else "",
            ))  # fmt: skip
    head = ("case", "ranks", "trainer", "samples/s", "ratio", "wall", "goal", "padding", "needed GFLOP/s", "peak MiB")
    return "\n".join([*lines, *table((*head, "loss"), cells)]) + "\n"


def alignment() -> str:
    """What a preference step costs, and what it would."""
    stored = json.loads((RESULTS / "alignment.json").read_text(encoding="utf-8"))
    shape = stored["shape"]
    lines = [
        "## Alignment",
        "",
        f"`python benchmarks/suite/alignment.py` → `alignment.json`: a DPO step (loss, backward, AdamW) of "
        f"{shape['pairs']} pairs on a LLaVA (tower {shape['tower'][0]} layers of {shape['tower'][1]}, frozen; decoder "
        f"{shape['decoder'][0]} of {shape['decoder'][1]}; {shape['vocabulary']} words), fp32, in turns in one process; "
        "CPU seconds on one thread, medians. Ratio: the other's / ours, the median of pairs. All losses agree to "
        f"{stored['largest difference']:.0e}. TRL ({stored['environment']['trl']}) computes its reference in each "
        "step: it has no precomputed one for images.",
        "",
        *table(
            ("", "s a step", "ratio"),
            ((name, f"{row['seconds']:.3f}", f"{row['ratio']:.2f}") for name, row in stored["rows"].items()),
        ),
    ]
    return "\n".join(lines)


def _score(row: Mapping[str, Any]) -> str:
    e = row["estimate"]
    return f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]"


def page() -> str:
    """Join the parts whose stored runs are there."""
    parts = [HEAD]
    if (RESULTS / "demo.json").is_file():
        parts.append(evaluation("The demo", "demo.json", "`make demo` → `demo.json`; % right unless it is CIDEr-D."))
    if (RESULTS / "encoders.json").is_file():
        parts.append(encoders())
    if (RESULTS / "expert.json").is_file():
        parts.append(expert())
    if (RESULTS / "dropin.json").is_file():
        parts.append(dropin())
    if (RESULTS / "train_step.json").is_file():
        parts.append(train_step())
    if (RESULTS / "alignment.json").is_file():
        parts.append(alignment())
    if (RESULTS / "compression.json").is_file():
        parts.append(compression())
    if (RESULTS / "clothing.json").is_file():
        parts.append(
            evaluation(
                "Photographs",
                "clothing.json",
                "The same recipe on 10 classes of clothing photographs (CC0, alexeygrigorev/clothing-dataset-small at "
                "256 px), fewer steps: `fastmllm demo recipes/emoji.yaml data.path=… stages.0.steps=120 "
                "stages.1.steps=60 eval.limit=250 eval.gallery=0` and one sweep cell → `clothing.json`. The run is "
                "shortened: 300 steps of the connector alone before a frozen SmolLM2 named 88 % of these photographs "
                "in a trial of its own, so the figure is that of 180 steps, not the most that these parts give.",
            )
        )
    return "\n".join(parts)


def main() -> None:
    path = ROOT / "docs" / "results.md"
    path.parent.mkdir(exist_ok=True)
    if "--check" in sys.argv:
        sys.exit(0 if path.read_text(encoding="utf-8") == page() else "docs/results.md: run benchmarks/results_page.py")
    path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
