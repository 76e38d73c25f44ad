"""The sweep's grid and its Pareto front; the report holds every section and escapes what it shows."""

from __future__ import annotations

import pytest
from PIL import Image

from fastmllm.bench.report import Example, Page, render
from fastmllm.bench.sweep import Cell, SweepConfig, cells, pareto, table
from fastmllm.eval.intervals import share
from fastmllm.eval.runner import CONDITIONS, Report, Row


def _cell(ms, right, **changes):
    known = {
        "image_size": 224,
        "visual_tokens": 9,
        "grid_tokens": 49,
        "method": "pool",
        "accuracy": share([True] * right + [False] * (10 - right)),
        "encoder_ms": 1.0,
        "prefill_ms": ms,
        "step_ms": 1.0,
        "peak_mib": 1.0,
        "gflops": 1.0,
    }
    return Cell(**{**known, **changes})


def test_grid_leaves_out_what_cannot_be():
    config = SweepConfig(image_sizes=(64, 128), visual_tokens=(1, 4, 9), methods=("pool", "bipartite_merge"))
    planned = list(cells(config, stride=32))
    assert (64, 9, "pool") not in planned  # 2 x 2 tokens at 64 px
    assert (64, 4, "none") in planned  # the whole grid, once
    assert (128, 9, "bipartite_merge") in planned
    assert len(planned) == 2 + 1 + 6
    with pytest.raises(ValueError, match=r"bench\.methods is empty"):
        SweepConfig(methods=())


def test_pareto_front():
    points = [_cell(5, 5), _cell(3, 4), _cell(4, 4), _cell(9, 9), _cell(8, 2)]
    assert [(c.prefill_ms, round(10 * c.accuracy.value)) for c in pareto(points)] == [(3, 4), (5, 5), (9, 9)]
    assert table(points).row_count == 5


def test_report_shows_every_section(tmp_path):
    image = tmp_path / "a.tif"
    Image.new("RGB", (4, 4)).save(image)
    report = Report(rows=[Row("name", c, "accuracy", share([c == "model"] * 20), 0.0) for c in CONDITIONS])
    report.rows.append(Row("caption", "model", "CIDEr-D", share([True]), None))
    page = render(
        Page(
            title="a <b> & c",
            notes=["one note"],
            facts={"encoder": "tiny"},
            histories={"pretrain": [(1, 2.0), (2, 1.0)]},
            report=report,
            chart_tasks=["name"],
            cells=[_cell(5, 5), _cell(7, 9, method="none"), _cell(6, 3, method="bipartite_merge", image_size=128)],
            examples=[Example(str(image), "owl", "<owl>", False)],
            seconds={"training": 1.0},
            licences=[("drawings", "npm", "MIT")],
        )
    )
    assert "a &lt;b&gt; &amp; c" in page
    assert "&lt;owl&gt;" in page
    assert "<b>" not in page
    assert page.count("<svg") == 3
    assert 'class="win"' in page
    for text in ("one note", "tiny", "MIT", "token merging", "data:image/png;base64,"):
        assert text in page
