"""Write README's results and its operators' figures from stored runs: python benchmarks/readme.py [--check]."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmllm.bench.sweep import setting

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RESULT = RESULTS / "cpu" / "demo.json"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
ROWS = (  # label, task, metric
    ("name it (exact match)", "name", "accuracy"),
    ("its name in Chinese", "name_zh", "accuracy"),
    ("its group", "group", "accuracy"),
    ("which of two is there (forced choice)", "exists", "forced choice"),
    ("is it there? yes/no", "yes_no", "accuracy"),
    ("how many, in a scene", "count", "accuracy"),
    ("where, in a scene", "position", "accuracy"),
    ("left of or above? yes/no", "relation", "accuracy"),
)
CONDITIONS = ("model", "blind", "wrong image", "majority", "random")


def block(metrics: Mapping[str, Any]) -> str:
    """Render the table and the lines around it."""
    found = {(r["task"], r["metric"], r["condition"]): r for r in metrics["evaluation"]}
    lines = [
        f"On {metrics['evaluated_on']}, % right with the 95 % interval:",
        "",
        "| task | n | model | blind | wrong image | majority | random |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for label, task, metric in ROWS:
        if (task, metric, "model") in found:
            cells = [_cell(found[task, metric, c]["estimate"]) for c in CONDITIONS]
            lines.append(f"| {label} | {found[task, metric, 'model']['estimate']['count']} | {' | '.join(cells)} |")
    lines += ["", *_prose(metrics, found)]
    return "\n".join(lines) + "\n"


def _cell(e: Mapping[str, float]) -> str:
    return f"{100 * e['value']:.0f} [{100 * e['low']:.0f}, {100 * e['high']:.0f}]"


def blind(row: Mapping[str, Any]) -> str:
    """Say what blind is, from its row; in runs stored before it was given the closed set it is something else."""
    if row["unparsed"]:
        return (
            f"Blind wrote freely in this run: {100 * row['unparsed']:.0f} % of its names could not be read and count "
            "as wrong, so it may lie below chance."
        )
    return "Blind is the answer of the task's closed set that the model finds most probable without the image."


def _prose(metrics: Mapping[str, Any], found: Mapping[tuple[str, str, str], Any]) -> list[str]:
    def value(task: str, metric: str, condition: str = "model") -> float:
        return found[task, metric, condition]["estimate"]["value"]

    text = [
        f"{blind(found['name', 'accuracy', 'blind'])} Forced choice: the right name is more probable than that of an "
        "absent thing of its group."
    ]
    if ("caption", "CIDEr-D", "model") in found:
        both = [100 * value("caption", "CHAIRs", c) for c in ("model", "blind")]
        text.append(
            f"Captions: CIDEr-D {value('caption', 'CIDEr-D'):.2f} (blind {value('caption', 'CIDEr-D', 'blind'):.2f}), "
            f"CHAIRs {both[0]:.0f} % (blind {both[1]:.0f} %). CIDEr-D: rare n-grams shared with the references, 0 to "
            "10; CHAIRs: captions that name something absent, less is better, and who names nothing has none."
        )
    if ("retrieval", "R@1 image to text", "model") in found:
        n = found["retrieval", "R@1 image to text", "model"]["estimate"]["count"]
        text.append(
            f"Retrieval among {n}: R@1 {100 * value('retrieval', 'R@1 image to text'):.0f} % image to text, "
            f"{100 * value('retrieval', 'R@1 text to image'):.0f} % text to image."
        )
    cells = metrics["sweep"]
    best = max(cells, key=lambda c: (c["accuracy"]["value"], -c["prefill_ms"]))
    near = [c for c in cells if c["accuracy"]["value"] >= best["accuracy"]["low"]]
    cheap = min(near, key=lambda c: c["prefill_ms"])
    machine, seconds = metrics["environment"], metrics["seconds"]
    total = sum(v for k, v in seconds.items() if k != "this run")
    text += [
        f"Sweep: the best of {len(cells)} cells names {_cell(best['accuracy'])} % of {best['accuracy']['count']} right "
        f"({_setting(best)}); the fastest within its interval takes {cheap['prefill_ms']:.0f} ms a prefill "
        f"instead of {best['prefill_ms']:.0f} ({_setting(cheap)}).",
        f"One run on {machine['device'].strip()}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{metrics['precision']}: {total / 60:.1f} minutes, {metrics['peak_memory_gib']:.1f} GiB at the most.",
    ]
    return text


def _setting(cell: Mapping[str, Any]) -> str:
    return setting(cell["image_size"], cell["visual_tokens"], cell["method"])


def figure(op: str, folder: Path) -> str:
    """Summarise an operator's rows: time of the fastest other provider / ours, median (lowest to highest)."""
    if not (folder / f"{op}.json").is_file():
        return ""
    fastest: dict[tuple[str, str], float] = {}
    for row in json.loads((folder / f"{op}.json").read_text(encoding="utf-8")):
        if row["provider"] != "fastmllm":
            key = (row["case"], row["mode"])
            fastest[key] = min(fastest.get(key, row["ratio"]), row["ratio"])
    ratios = sorted(fastest.values())
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else ""


def operator_row(row: re.Match[str]) -> str:
    """Return a row of README's operators' table with the figures that are stored."""
    gpus = sorted(f for f in RESULTS.iterdir() if f.is_dir() and f.name != "cpu")
    on_gpu = ", ".join(f"{f.name}: {text}" for f in gpus if (text := figure(row[1], f)))
    cells = (figure(row[1], RESULTS / "cpu") or "not yet measured", on_gpu or "not yet measured on a GPU")
    return f"| `{row[1]}` |{row[2]}|{row[3]}| {cells[0]} | {cells[1]} |"


def updated(readme: str, metrics: Mapping[str, Any]) -> str:
    """Return README's text with the results and the figures of the operators replaced."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    head, operators, rest = (head + BEGIN + block(metrics) + END + tail).partition("\n## Operators\n")
    row = re.compile(r"^\| `(\w+)` \|([^|]*)\|([^|]*)\|.*$", re.MULTILINE)
    table, end, tail = rest.partition("\n## ")
    return head + operators + row.sub(operator_row, table) + end + tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether README is up to date")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = updated(old, json.loads(RESULT.read_text(encoding="utf-8")))
    if arguments.check:
        sys.exit(
            0 if old == new else "README.md does not show benchmarks/results/cpu/demo.json: run benchmarks/readme.py"
        )
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
