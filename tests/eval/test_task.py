"""Tasks as four pure functions, their metrics, and what the runner keeps of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastmllm.data.sample import Sample
from fastmllm.eval.answers import AnswerLog
from fastmllm.eval.runner import EvalConfig, evaluate_tasks
from fastmllm.eval.task import Scored, Task, mean_of, of_sums, share_of, whole_groups


def _sum_task(**more):
    """Documents are pairs of numbers: what is their sum?"""

    def prompt(document):
        a, b = document
        return Sample(id=f"{a}+{b}", prompt=f"{a}+{b}=", answer=str(a + b), task="sum", image=f"{a}.png")

    fields = {
        "name": "sum", "documents": [(a, b) for a in range(4) for b in range(3)], "prompt": prompt,
        "parse": lambda text, s: int(text) if text.isdecimal() else None,
        "score": lambda parsed, s: {"right": float(parsed == int(s.answer))},
        "metrics": {"accuracy": share_of("right"), "whole images": whole_groups(lambda s: s.image)},
    }  # fmt: skip
    return Task(**(fields | more))


class Adds:
    """Sees the first number in the image; knows the second one from the words."""

    def answer(self, samples, max_new_tokens):
        if any(s.image == "3.png" and s.prompt[0] == "3" and s.prompt[2] == "2" for s in samples):
            raise ValueError("3+2: not an image")
        return ["?" if s.image is None else str(int(s.image[0]) + int(s.prompt[2])) for s in samples]

    def score(self, samples):
        return [[0.0] * len(s.choices) for s in samples]


def test_every_condition_has_rows_records_and_failures(tmp_path):
    log = AnswerLog(tmp_path)
    report = evaluate_tasks(Adds(), [_sum_task()], EvalConfig(), log)
    assert report.get("sum").estimate.value == pytest.approx(11 / 12)
    assert report.get("sum").unparsed == pytest.approx(1 / 12)
    assert report.get("sum", metric="whole images").estimate.value == 0.75
    assert report.get("sum", "blind").unparsed == 1.0
    assert report.get("sum", "wrong image").estimate.value == 0.0
    assert [f["id"] for f in report.failures] == ["3+2"]
    record = next(r for r in report.records if r["id"] == "2+1" and r["condition"] == "model")
    assert (record["said"], record["parsed"], record["verdict"], record["image"]) == ("3", 3, 1.0, "2.png")
    assert len(report.records) == 5 * 12
    again = evaluate_tasks(None_Asked(), [_sum_task()], EvalConfig(), AnswerLog(tmp_path))
    assert again.records == report.records  # the parser may change, the answers stay


class None_Asked(Adds):
    def answer(self, samples, max_new_tokens):
        raise AssertionError("asked again")


def test_what_goes_together_is_the_truths_cluster_the_image_or_the_question():
    sample = Sample(id="q", prompt="?", answer="x", task="t", image="a.png", truth={"cluster": "sentence"})
    given = [sample, replace(sample, truth={}), replace(sample, truth={}, image=None)]
    assert [Scored(s, "x", {}).cluster for s in given] == ["sentence", "a.png", "q"]


def test_ids_and_names_are_unique():
    with pytest.raises(ValueError, match="two questions have the id '0\\+0'"):
        _sum_task(documents=[(0, 0), (0, 0)]).samples()
    with pytest.raises(ValueError, match="two tasks have one name"):
        evaluate_tasks(Adds(), [_sum_task(), _sum_task()], EvalConfig())


def test_metrics_know_images():
    def scored(image, **counts):
        return Scored(Sample(id=str(counts), prompt="?", answer="x", task="t", image=image), "x", counts)

    items = [
        scored("a", right=1.0, wrong=0.0, of=4.0),
        scored("a", right=0.0, wrong=3.0, of=4.0),
        scored("b", right=1.0),
    ]
    assert share_of("right")(items, 0).value == pytest.approx(2 / 3)
    assert share_of("wrong", "of")(items, 0).value == pytest.approx(3 / 8)
    assert share_of("wrong", "of")(items, 0).count == 8
    assert mean_of("of")(items, 0).value == pytest.approx(8 / 3)
    assert of_sums(lambda s: s["wrong"] / 10)(items, 0).value == pytest.approx(0.3)
    assert whole_groups(lambda s: s.image or "")(items, 0).value == 0.5
