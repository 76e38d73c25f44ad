"""Pairs in both orders: judges with a taste for places or for length do not decide."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fastmllm.eval.answers import AnswerLog
from fastmllm.eval.judge import JudgeError
from fastmllm.eval.judge_runs import judge_runs, verdicts_table
from fastmllm.eval.pairwise import Judged, judge_pairs, length_controlled, win_rate

QUESTIONS = {f"q{i}": "What?" for i in range(30)}
ANSWERS = {
    "good": dict.fromkeys(QUESTIONS, "right"),
    "long": {i: "right, and very much so" if int(i[1:]) % 3 else "wrong, at length" for i in QUESTIONS},
    "bad": dict.fromkeys(QUESTIONS, "wrong"),
}


def _parts(prompt):
    first = prompt.split("[Answer 1]\n")[1].split("\n[End")[0]
    second = prompt.split("[Answer 2]\n")[1].split("\n[End")[0]
    return first, second


def _fair(prompt):
    first, second = ("right" in part for part in _parts(prompt))
    return f"Verdict: {'tie' if first == second else 1 if first else 2}"


def test_both_orders_agree_for_a_fair_judge():
    found = judge_pairs(ANSWERS, QUESTIONS, _fair, "fair")
    assert len(found.judged) == 3 * 30
    assert (found.unparsed, found.flipped) == (0.0, 0.0)
    assert win_rate(found.judged, "good", "bad").value == 1.0
    assert win_rate(found.judged, "bad", "good").value == 0.0
    assert win_rate(found.judged, "good", "long").value == pytest.approx(1 / 3 + 0.5 * 2 / 3)
    record = found.judged[0]
    assert (record.judge, len(record.prompt), record.replies) == ("fair", 16, ("Verdict: 1", "Verdict: 2"))


def test_a_taste_for_the_first_place_is_a_tie():
    found = judge_pairs(ANSWERS, QUESTIONS, lambda prompt: "Verdict: 1", "first")
    assert found.flipped == 1.0
    assert {j.winner for j in found.judged} == {""}
    assert {g.points for g in found.games()} == {0.5}


def test_no_verdict_is_no_score():
    def judge(prompt):
        if "very much" in _parts(prompt)[0]:
            raise JudgeError("timed out")
        return "I like both." if "at length" in _parts(prompt)[1] else _fair(prompt)

    two = {m: ANSWERS[m] for m in ("good", "long")}
    found = judge_pairs(two, QUESTIONS, judge, "broken")
    assert found.unparsed == 1.0
    assert found.games() == []
    assert len(found.failures) == 20
    assert win_rate(found.judged, "good", "long").count == 0
    assert length_controlled(found.judged, "good", "long").count == 0


def test_a_question_that_a_model_did_not_answer_is_listed():
    short = {m: dict(a) for m, a in ANSWERS.items()}
    del short["bad"]["q3"]
    found = judge_pairs(short, QUESTIONS, _fair, "fair")
    assert found.left_out == ["q3"]
    assert len(found.judged) == 3 * 29
    with pytest.raises(ValueError, match="a pair needs two"):
        judge_pairs({"a": {}}, QUESTIONS, _fair, "fair")


def test_replies_are_kept_and_failures_asked_again(tmp_path):
    asked, broken = [], {"on": True}

    def judge(prompt):
        asked.append(prompt)
        if broken["on"] and len(asked) % 2:
            raise JudgeError("busy")
        return _fair(prompt)

    def run():
        asked.clear()
        two = {m: ANSWERS[m] for m in ("good", "bad")}
        return judge_pairs(two, QUESTIONS, judge, "j", log=AnswerLog(tmp_path, block=1, retry=True))

    assert (run().unparsed, len(asked)) == (0.5, 60)
    broken["on"] = False
    assert (run().unparsed, len(asked)) == (0.0, 30)
    assert (run().unparsed, len(asked)) == (0.0, 0)


def _judged(points, length_a, length_b, number):
    return Judged(
        id=str(number), a="a", b="b", winner={1.0: "a", 0.0: "b", 0.5: ""}[points], flipped=False, replies=("", ""),
        length_a=length_a, length_b=length_b, judge="j", prompt="p",
    )  # fmt: skip


def test_length_is_controlled_for():
    """A judge who likes length, and a model that writes more and is no better."""
    rng = np.random.default_rng(0)
    more = rng.normal(60, 100, 400).astype(int)
    likes = 1 / (1 + np.exp(-2 * np.tanh(more / more.std())))
    won = rng.random(400) < likes
    rows = [_judged(float(w), 500 + int(d), 500, i) for i, (w, d) in enumerate(zip(won, more, strict=True))]
    assert win_rate(rows, "a", "b").low > 0.55
    controlled = length_controlled(rows, "a", "b")
    assert controlled.low < 0.5 < controlled.high
    assert controlled.value == pytest.approx(0.5, abs=0.06)
    turned = [replace(r, a="b", b="a", length_a=r.length_b, length_b=r.length_a) for r in rows[::2]] + rows[1::2]
    assert length_controlled(turned, "a", "b").value == pytest.approx(controlled.value)
    # where length has no part in it, control changes little
    rows = [_judged(float(i % 5 > 0), 100 + 50 * (i % 2), 125, i) for i in range(100)]
    assert length_controlled(rows, "a", "b").value == pytest.approx(0.8, abs=0.03)
    assert length_controlled(rows, "b", "a").value == pytest.approx(0.2, abs=0.03)


def test_runs_are_judged_and_written(tmp_path):
    for name, said in ANSWERS.items():
        records = [
            {
                "id": i,
                "task": "caption",
                "condition": "model",
                "verdict": 1.0,
                "answer": "right",
                "said": t,
                "prompt": "?",
            }
            for i, t in said.items()
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"value": {"records": records}}))
    runs = [tmp_path / name for name in ANSWERS]
    standing = judge_runs(runs, "caption", _fair, "fair", tmp_path / "out")
    assert list(standing.ratings) == sorted(map(str, runs))
    assert standing.ratings[str(runs[0])].low > standing.ratings[str(runs[2])].high
    stored = json.loads((tmp_path / "out" / "judged.json").read_text())
    assert stored["verdicts"]["judged"][0]["judge"] == "fair"
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(verdicts_table(standing))
    assert "100 [100, 100]" in console.export_text()
    with pytest.raises(ValueError, match="it has caption"):
        judge_runs(runs, "scene", _fair, "fair", tmp_path / "out")
