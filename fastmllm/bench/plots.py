"""Plots of a run as SVG text, to be embedded in a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmllm.bench.sweep import LABELS, Cell, pareto
from fastmllm.eval.report import CONDITIONS, MODEL, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED = "#1f2933", "#8a94a0"
COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#7d5ba6")
MARKERS = {"none": "o", "pool": "s", "bipartite_merge": "^"}


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e4e7eb",
            "axes.axisbelow": True,
            "svg.hashsalt": "fastmllm",
        }
    )
    return plt.subplots(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> str:
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def loss_curves(histories: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Draw the loss of each stage, smoothed, over the steps of the whole run."""
    figure, axes = _figure(7.2, 3.0)
    offset = 0
    for (name, points), colour in zip(histories.items(), COLOURS, strict=False):
        steps = [offset + s for s, _ in points]
        losses = [v for _, v in points]
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(losses), color=colour, linewidth=2, label=name)
        offset = steps[-1] if steps else offset
    axes.set(xlabel="step", ylabel="loss, nats an answer token", ylim=(0, None))
    axes.legend(frameon=False)
    return _svg(figure)


def _smooth(values: Sequence[float], factor: float = 0.9) -> list[float]:
    out: list[float] = []
    state, weight = 0.0, 0.0
    for value in values:
        state, weight = factor * state + (1 - factor) * value, factor * weight + (1 - factor)
        out.append(state / weight)
    return out


def controls_chart(report: Report, tasks: Sequence[str]) -> str:
    """Draw the model beside its controls, a group of bars a task, with 95 % intervals."""
    figure, axes = _figure(9.0, 3.4)
    width = 0.8 / len(CONDITIONS)
    for i, (condition, colour) in enumerate(zip(CONDITIONS, COLOURS, strict=True)):
        estimates = [report.get(task, condition).estimate for task in tasks]
        x = [t + (i - (len(CONDITIONS) - 1) / 2) * width for t in range(len(tasks))]
        values = [100 * e.value for e in estimates]
        errors = [[100 * (e.value - e.low) for e in estimates], [100 * (e.high - e.value) for e in estimates]]
        axes.bar(x, values, width * 0.92, color=colour, alpha=1.0 if condition == MODEL else 0.75, label=condition)
        axes.errorbar(x, values, yerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    axes.set_xticks(range(len(tasks)), [t.replace("_", " ") for t in tasks])
    axes.set(ylabel="right, %", ylim=(0, 104))
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, ncols=len(CONDITIONS), loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return _svg(figure)


def pareto_chart(points: Sequence[Cell], baseline: float | None = None) -> str:
    """Draw accuracy over prefill latency; colour = resolution, mark = compressor, number = tokens, line = the front."""
    figure, axes = _figure(9.0, 4.6)
    sizes = sorted({c.image_size for c in points})
    for size, colour in zip(sizes, COLOURS, strict=False):
        for method, marker in MARKERS.items():
            chosen = [c for c in points if (c.image_size, c.method) == (size, method)]
            if chosen:
                x, y = [c.prefill_ms for c in chosen], [100 * c.accuracy.value for c in chosen]
                axes.scatter(x, y, s=44, color=colour, marker=marker, zorder=3, edgecolor="white", linewidth=0.6)
                for c in chosen:
                    axes.annotate(
                        str(c.visual_tokens),
                        (c.prefill_ms, 100 * c.accuracy.value),
                        textcoords="offset points",
                        xytext=(5, 4),
                        fontsize=8,
                        color=colour,
                    )
    front = pareto(points)
    axes.plot(
        [c.prefill_ms for c in front], [100 * c.accuracy.value for c in front], color=MUTED, linestyle="--", zorder=2
    )
    if baseline is not None:
        axes.axhline(100 * baseline, color=MUTED, linewidth=1, linestyle=":")
        axes.annotate("blind", (1.0, 100 * baseline), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      color=MUTED)  # fmt: skip
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=c, marker="o", linestyle="", label=f"{s} px") for s, c in zip(sizes, COLOURS, strict=False)
    ]
    handles += [
        Line2D([], [], color=MUTED, marker=m, linestyle="", label=LABELS[k])
        for k, m in MARKERS.items()
        if any(c.method == k for c in points)
    ]
    handles.append(Line2D([], [], color=MUTED, linestyle="--", label="Pareto front"))
    axes.legend(handles=handles, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.14), fontsize=9)
    axes.set(xlabel="prefill latency with encoder, ms (batch 1; the number at a mark is its visual tokens)",
             ylabel="named right, %", ylim=(0, 104))  # fmt: skip
    return _svg(figure)
