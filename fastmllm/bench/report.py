"""Write a run as one HTML page: what was done, what came out, beside what it has to beat."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastmllm.bench import plots
from fastmllm.bench.sweep import LABELS, Cell, pareto
from fastmllm.data.images import open_image
from fastmllm.eval.intervals import Estimate
from fastmllm.eval.report import CONDITIONS, MODEL, PLAIN, Report, unparsed

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #e4e7eb; }
table { border-collapse: collapse; font-size: 13px; width: 100%; } th, td { padding: .25rem .4rem; text-align: right; }
td { white-space: nowrap; } td.text { white-space: normal; }
th { border-bottom: 2px solid #cbd2d9; } td { border-bottom: 1px solid #e4e7eb; }
th:first-child, td:first-child, .text { text-align: left; } td.win { font-weight: 600; } .muted { color: #616e7c; }
.note { background: #fff8e6; border-left: 4px solid #edae49; padding: .5rem .8rem; margin: .6rem 0; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem; }
.gallery figure { margin: 0; text-align: center; font-size: 13px; }
.gallery img { width: 100%; border: 1px solid #e4e7eb; }
.right { color: #2f7d4f; } .wrong { color: #b3394a; } svg { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True, slots=True)
class Example:
    """A held-out image with its right answer and what the model said."""

    image: str
    answer: str
    said: str
    correct: bool


@dataclass(slots=True)
class Page:
    """What the page shows; every section is left out when it is empty.

    Args:
        title: heading. summary: first paragraphs. notes: what the reader must know to read the numbers.
        facts: label -> value, the set-up. histories: stage -> (step, loss). report: evaluation. cells: sweep.
        examples: held-out answers. seconds: phase -> wall time. candidates: rows of other runs on the same budget.
        sweep_note, candidates_note: how those were measured, and where.
        licences: asset, source, licence.
    """

    title: str
    summary: Sequence[str] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    histories: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    report: Report | None = None
    chart_tasks: Sequence[str] = ()
    cells: Sequence[Cell] = ()
    sweep_note: str = ""
    examples: Sequence[Example] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    candidates: Sequence[Mapping[str, str]] = ()
    candidates_note: str = ""
    licences: Sequence[tuple[str, str, str]] = ()


def render(page: Page) -> str:
    """Return the page as HTML with everything embedded."""
    parts = [f"<h1>{html.escape(page.title)}</h1>"]
    parts += [f"<p>{html.escape(p)}</p>" for p in page.summary]
    parts += [f'<div class="note">{html.escape(n)}</div>' for n in page.notes]
    if page.examples:
        parts += ["<h2>Held-out images, and what the model called them</h2>", _gallery(page.examples)]
    if page.report is not None:
        parts += ["<h2>Evaluation</h2>", _evaluation_text(), plots.controls_chart(page.report, page.chart_tasks)]
        parts.append(_evaluation(page.report))
    if page.cells:
        blind = None
        if page.report is not None:
            blind = page.report.get("name", "blind").estimate.value
        parts += [
            "<h2>What a pixel and a visual token cost and buy</h2>",
            _sweep_text(page.cells),
            _note(page.sweep_note),
        ]
        parts += [plots.pareto_chart(page.cells, blind), _sweep(page.cells)]
    if page.candidates:
        parts += ["<h2>Encoders on the same budget</h2>", _note(page.candidates_note), _rows(page.candidates)]
    if page.histories:
        parts += ["<h2>Training</h2>", plots.loss_curves(page.histories)]
    if page.facts:
        parts += ["<h2>Set-up</h2>", _pairs(page.facts)]
    if page.seconds:
        parts += ["<h2>Time</h2>", _pairs({k: f"{v:.1f} s" for k, v in page.seconds.items()})]
    if page.licences:
        names = ("asset", "source", "licence")
        rows = [dict(zip(names, row, strict=True)) for row in page.licences]
        parts += ["<h2>Licences of what was used</h2>", _rows(rows)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(page.title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _note(text: str) -> str:
    return f'<p class="muted">{html.escape(text)}</p>' if text else ""


def _evaluation_text() -> str:
    return (
        '<p class="muted">Every score stands beside the same questions without an image (blind: the answer of the '
        "task's closed set that the model then finds most probable; captions are written freely), with another image "
        "(wrong image), the most frequent training answer (majority) and a random answer; retrieval stands beside "
        "chance. Brackets are 95 % intervals. Bold: the model's interval lies above those of all its controls. "
        "Unparsed answers count as wrong; their shares stand in the order of the columns. Forced choice: the right "
        "name has a higher log-probability than an absent one. CIDEr-D: how many rare n-grams a caption shares with "
        "its references, 0 to 10. CHAIR, less is better: the share of captions (s) or of mentioned objects (i) that "
        "name something absent; who names nothing has none, so read it with the object recall.</p>"
    )


def _evaluation(report: Report) -> str:
    names = ("task", "metric", "n", *CONDITIONS, "unparsed, %")
    head = "".join(f'<th class="text">{n}</th>' if n == "metric" else f"<th>{n}</th>" for n in names)
    lines = []
    for task, metric in dict.fromkeys((r.task, r.metric) for r in report.rows):
        found = {r.condition: r for r in report.rows if (r.task, r.metric) == (task, metric)}
        mine = found[MODEL]
        others = [found[c].estimate for c in CONDITIONS[1:] if c in found]
        lower_is_better = metric.startswith(("CHAIR", "false yes")) or metric in ("yes ratio", "words")
        win = not lower_is_better and bool(others) and all(mine.estimate.above(o) for o in others)
        cells = []
        for condition in CONDITIONS:
            text = _estimate(found[condition].estimate, metric) if condition in found else "–"
            cells.append(f'<td class="win">{text}</td>' if win and condition == MODEL else f"<td>{text}</td>")
        lines.append(
            f'<tr><td>{html.escape(task)}</td><td class="text">{html.escape(metric)}</td><td>{mine.estimate.count}</td>'
            f"{''.join(cells)}<td>{unparsed(found) or '–'}</td></tr>"
        )
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _estimate(e: Estimate, metric: str) -> str:
    if metric in PLAIN:
        return f"{e.value:.2f} <span class='muted'>[{e.low:.2f}, {e.high:.2f}]</span>"
    return f"{100 * e.value:.1f} % <span class='muted'>[{100 * e.low:.0f}, {100 * e.high:.0f}]</span>"


def _percent(e: Estimate) -> str:
    return f"{100 * e.value:.0f} % [{100 * e.low:.0f}, {100 * e.high:.0f}]"


def _sweep_text(cells: Sequence[Cell]) -> str:
    front = pareto(cells)
    best = max(cells, key=lambda c: c.accuracy.value)
    cheap = next((c for c in front if c.accuracy.value >= best.accuracy.low), best)
    text = (
        f"The weights are those trained above; only resolution, token count and compressor change. The best cell "
        f"names {_percent(best.accuracy)} of {best.accuracy.count} right ({best}); the fastest cell within its "
        f"interval takes {cheap.prefill_ms:.0f} ms instead of {best.prefill_ms:.0f} ({cheap})."
    )
    return f"<p>{html.escape(text)}</p>"


def _sweep(cells: Sequence[Cell]) -> str:
    front = pareto(cells)
    rows = [
        {
            "resolution": f"{c.image_size} px",
            "visual tokens": f"{c.visual_tokens} of {c.grid_tokens}",
            "method": LABELS.get(c.method, c.method),
            "named right": _percent(c.accuracy),
            "encoder, ms": f"{c.encoder_ms:.1f}",
            "prefill, ms": f"{c.prefill_ms:.1f}",
            "training step, ms": f"{c.step_ms:.0f}",
            "peak memory, MiB": f"{c.peak_mib:.0f}",
            "prefill, GFLOP": f"{c.gflops:.2f}",
            "Pareto": "✓" if c in front else "",
        }
        for c in cells
    ]
    return _rows(rows)


def _rows(rows: Sequence[Mapping[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _pairs(pairs: Mapping[str, str]) -> str:
    lines = (f'<tr><td>{html.escape(k)}</td><td class="text">{html.escape(str(v))}</td></tr>' for k, v in pairs.items())
    return f"<table>{''.join(lines)}</table>"


def _embedded(path: Path) -> tuple[str, str]:
    """Return an image's kind and base64; what not every browser shows (TIFF) becomes a PNG."""
    kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}
    if kind := kinds.get(path.suffix.lower()):
        return kind, base64.b64encode(path.read_bytes()).decode()
    buffer = io.BytesIO()
    open_image(path).save(buffer, format="PNG")
    return "png", base64.b64encode(buffer.getvalue()).decode()


def _gallery(examples: Sequence[Example]) -> str:
    figures = []
    for e in examples:
        kind, data = _embedded(Path(e.image))
        verdict = "right" if e.correct else "wrong"
        truth = "" if e.correct else f'<br><span class="muted">{html.escape(e.answer)}</span>'
        figures.append(
            f'<figure><img alt="{html.escape(e.answer)}" src="data:image/{kind};base64,{data}">'
            f'<figcaption><span class="{verdict}">'
            f"{html.escape(e.said) or '(nothing)'}</span>{truth}</figcaption></figure>"
        )
    return f'<div class="gallery">{"".join(figures)}</div>'
