"""Who looks is right everywhere; who always says yes affirms all that is false, and is consistent nowhere."""

from __future__ import annotations

import pytest

from fastmllm.data.sample import Sample
from fastmllm.eval import controls
from fastmllm.eval.exact_truth import tasks_of
from fastmllm.eval.runner import EvalConfig, evaluate_tasks

KINDS = ("existence, random", "relation, upright")


def statements(pairs: int, language: str = "en") -> list[Sample]:
    yes, no = ("yes", "no") if language == "en" else ("是", "否")
    return [
        Sample(
            id=f"{kind}/{i}/{scene}/{which}", prompt=f"{kind} {i} {which}?", answer=yes if scene == which else no,
            task="hallucination", image=f"{kind}{i}{scene}.png", choices=(yes, no), language=language,
            truth={
                "cluster": f"{kind}/{i}", "question": f"{kind}/{i}/{which}", "true": scene == which, "kind": kind,
                "dimension": kind.split(",")[0],
            },
        )
        for kind in KINDS for i in range(pairs) for scene in (0, 1) for which in (0, 1)
    ]  # fmt: skip


class Says:
    def __init__(self, say) -> None:
        self.say = say

    def answer(self, samples, max_new_tokens):
        return [self.say(s) for s in samples]

    def score(self, samples):
        return [[0.0 if c == self.say(s) else -1.0 for c in s.choices] for s in samples]


def values(say, items: list[Sample], name: str = "hallucination"):
    report = evaluate_tasks(Says(say), tasks_of({name: items}, {}), EvalConfig())
    return lambda metric, condition="model": report.get(name, condition, metric).estimate.value


@pytest.mark.parametrize(("name", "language"), [("hallucination", "en"), ("hallucination_zh", "zh")])
def test_who_looks_and_who_does_not(name: str, language: str) -> None:
    items = statements(5, language)
    seeing = values(lambda s: s.answer if s.image else "", items, name)
    assert [seeing(m) for m in ("accuracy", "qAcc", "fAcc", "F1", "false yes")] == [1, 1, 1, 1, 0]
    agreeing = values(lambda s: s.choices[0], items, name)
    assert [agreeing(m) for m in ("accuracy", "qAcc", "fAcc", "false yes", "yes ratio")] == [0.5, 0, 0, 1, 1]
    assert seeing("accuracy", controls.BLIND) == 0.5


def test_kinds_are_counted_apart() -> None:
    found = values(lambda s: s.answer if s.truth["kind"] == KINDS[0] else "yes", statements(3))
    assert found(f"false yes, {KINDS[0]}") == 0
    assert found(f"false yes, {KINDS[1]}") == 1
    assert found("accuracy, existence") == 1
    assert found("accuracy, relation") == 0.5
    assert found("qAcc") == 0.5


def test_a_choice_is_consistent_or_not() -> None:
    items = [
        Sample(
            id=f"{i}{scene}", prompt=f"{i}?", answer="ab"[scene], task="hallucination_choice", image=f"{i}{scene}.png",
            choices=("ab"[scene], "ab"[1 - scene]),
            truth={"cluster": str(i), "question": str(i), "kind": KINDS[0], "dimension": "existence"},
        )
        for i in range(4) for scene in (0, 1)
    ]  # fmt: skip
    stubborn = values(lambda s: "a", items, "hallucination_choice")
    assert (stubborn("forced choice"), stubborn("qAcc")) == (0.5, 0.0)
    assert values(lambda s: s.answer, items, "hallucination_choice")("qAcc") == 1.0


def test_chinese_captions_are_read_without_spaces() -> None:
    items = [
        Sample(
            id=str(i), prompt="图中有什么？", answer="猫、狗", references=("猫、狗",), task="hallucination_caption",
            image=f"{i}.png", language="zh",
            truth={"objects": ["猫", "狗"], "vocabulary": ["猫", "狗", "熊猫", "鼓"], "cluster": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    found = values(lambda s: "图中有猫和熊猫。", items, "hallucination_caption_zh")
    assert found("CHAIRi") == 0.5  # a panda is no cat
    assert found("CHAIRs") == 1.0
    assert found("object recall") == 0.5


def test_a_limit_keeps_pairs_whole() -> None:
    kept = controls.limited(statements(5), 10)
    assert len(kept) == 8
    assert all(sum(k.truth["cluster"] == s.truth["cluster"] for k in kept) == 4 for s in kept)
