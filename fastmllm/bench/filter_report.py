"""Write what a filter did as one HTML page: thresholds, reject rates, and pictures of what each reason threw out."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import asdict
from typing import Any

from fastmllm.bench.report import STYLE
from fastmllm.data.filtering.decide import Example, Filtered
from fastmllm.data.images import ImageError, open_image

SIDE = 160  # pixels of an example


def render_filter(filtered: Filtered, title: str, scale: str = "") -> str:
    """Return the page.

    Args:
        filtered: what `decide` returned.
        title: heading.
        scale: of the image-text score, such as "raw cosine".
    """
    share = f"{filtered.kept / filtered.seen:.1%}"
    thresholds = [[name, _shown(value)] for name, value in asdict(filtered.config).items()]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{filtered.kept:,} of {filtered.seen:,} samples are kept ({share}).</p>",
        "<h2>Thresholds</h2>", _table(("threshold", "value"), thresholds),
        "<h2>What was dropped</h2>", _reasons(filtered),
    ]  # fmt: skip
    if filtered.scores:
        deciles = [[f"{10 * i} %", f"{value:.4f}"] for i, value in enumerate(filtered.scores["deciles"])]
        cut = "" if filtered.cut is None else f" The top fraction ends at {filtered.cut:.4f}."
        note = f"{filtered.scores['count']:,} scores{', ' + scale if scale else ''}.{cut}"
        parts += ["<h2>Image-text scores</h2>", f"<p>{html.escape(note)}</p>", _table(("quantile", "score"), deciles)]
    for reason, examples in filtered.examples.items():
        parts += [f"<h2>{html.escape(reason)}</h2>", f'<div class="gallery">{"".join(map(_figure, examples))}</div>']
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _reasons(filtered: Filtered) -> str:
    rows = [
        [reason, f"{count:,}", f"{count / filtered.seen:.2%}", f"{filtered.failing.get(reason, count):,}"]
        for reason, count in sorted(filtered.dropped.items(), key=lambda item: -item[1])
    ]
    return _table(("first reason", "samples", "reject rate", "samples that it speaks against"), rows)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) or "–" if isinstance(value, list | tuple) else str(value)


def _table(names: tuple[str, ...], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _figure(example: Example) -> str:
    pictures = "".join(_picture(name) for name in (*example.images[:1], *example.like[:1]))
    words = f'{html.escape(example.text)}<br><span class="muted">{html.escape(example.detail)}</span>'
    return f"<figure>{pictures}<figcaption>{words}</figcaption></figure>"


def _picture(name: str) -> str:
    try:
        image = open_image(name)
    except ImageError:
        return '<p class="muted">no picture: it cannot be decoded</p>'
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
