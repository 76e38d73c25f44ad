"""Paired tests: by id, against scipy, over images."""

from __future__ import annotations

import json
import random

import pytest
from rich.console import Console

from fastmllm.eval.compare import compare_runs, comparison_table, mcnemar, read_records


def _records(verdicts, task="name", images=None, answer="x"):
    return [
        {"id": f"q{i}", "task": task, "condition": "model", "verdict": v, "answer": answer,
         "image": (images or {}).get(i, f"{i}.png")}
        for i, v in enumerate(verdicts)
    ]  # fmt: skip


def test_mcnemar_is_the_exact_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    for a, b in ((0, 0), (1, 0), (3, 9), (40, 41), (700, 800)):
        expected = stats.binomtest(a, a + b).pvalue if a + b else 1.0
        assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_answers_are_paired_by_id():
    a, b = _records([1.0] * 20 + [0.0] * 10), _records([0.0] * 20 + [1.0] * 10)
    random.Random(0).shuffle(b)
    (row,) = compare_runs(a, b).tasks
    assert (row.only_a, row.only_b, row.count, row.unpaired) == (20, 10, 30, 0)
    assert row.difference.value == pytest.approx(-1 / 3)
    assert row.difference.high < 0.05
    (same,) = compare_runs(a, a).tasks
    assert (same.difference.low, same.difference.high, same.p) == (0.0, 0.0, 1.0)


def test_questions_about_one_image_widen_the_interval():
    verdicts = [float(i // 10 % 2) for i in range(100)]
    a = _records([0.0] * 100)
    alone = compare_runs(a, _records(verdicts)).tasks[0].difference
    together = compare_runs(_records([0.0] * 100, images={i: str(i // 10) for i in range(100)}), _records(verdicts))
    wide = together.tasks[0].difference
    assert wide.high - wide.low > 2 * (alone.high - alone.low)


def test_what_cannot_be_paired_is_said():
    a = _records([1.0, 1.0, 0.0]) + _records([1.0], task="count")
    b = _records([1.0, 1.0])
    b[1]["answer"] = "y"
    found = compare_runs(a, b)
    assert found.left_out == ["name: q1: the expected answers differ", "count: no common question"]
    assert (found.tasks[0].count, found.tasks[0].unpaired) == (1, 3)
    with pytest.raises(ValueError, match="no question in common"):
        compare_runs(a, _records([1.0], task="other"))
    assert json.loads(found.to_json())["tasks"][0]["task"] == "name"


def test_scores_have_an_interval_and_no_p(tmp_path):
    found = compare_runs(_records([2.5, 3.0]), _records([3.5, 4.0]))
    assert (found.tasks[0].p, found.tasks[0].difference.value) == (None, 1.0)
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(found, "a", "b"))
    assert "+1.000 [+1.000, +1.000]" in console.export_text()


def test_runs_are_read_from_their_folder(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"value": {"records": _records([1.0])}}))
    assert read_records(tmp_path) == read_records(tmp_path / "evaluation.json") == _records([1.0])
    (tmp_path / "evaluation.json").write_text('{"value": {"records": [{"id": 1}]}}')
    with pytest.raises(ValueError, match="run fastmllm eval again"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match="run fastmllm eval with --out first"):
        read_records(tmp_path / "nothing")
