"""The words of a question, and its picture, have as many right answers of one kind as of the other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fastmllm.data.canvas import habits_of
from fastmllm.data.hallucination import hallucination_set
from fastmllm.data.sample import Sample
from fastmllm.data.tasks import Subject
from fastmllm.eval.parsing import parse_yes_no

NAMES_EN = ("ant", "bus", "cat", "drum", "eggs", "fox", "goat", "hat")
NAMES_ZH = ("蚂蚁", "巴士", "猫", "鼓", "蛋", "狐狸", "山羊", "帽")
SEEN = [
    Sample(id=str(i), prompt="?", answer="x", task="count", image=str(i), truth={"objects": [a, b]})
    for i, (a, b) in enumerate([("ant", "bus"), ("cat", "drum"), ("ant", "hat"), ("goat", "hat")])
]


@pytest.fixture(scope="module")
def asked(standing_pool: list[Subject], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Sample]]:
    tasks, notes = hallucination_set(
        standing_pool, pool=lambda s: True, languages=("en", "zh"), num=3, split="eval", seed=0,
        habits=habits_of(SEEN), folder=tmp_path_factory.mktemp("scenes"), key="k", size=32,
    )  # fmt: skip
    assert notes == []
    return tasks


def test_every_task_is_there_in_both_languages(asked: dict[str, list[Sample]]) -> None:
    counts = {task: len(samples) for task, samples in asked.items()}
    for suffix in ("", "_zh"):
        assert counts["hallucination" + suffix] == 9 * 3 * 4
        assert counts["hallucination_choice" + suffix] == 9 * 3 * 2
        assert counts["hallucination_caption" + suffix] == 3 * 3 * 2
    assert len({s.id for samples in asked.values() for s in samples}) == sum(counts.values())
    assert all(Path(s.image).is_file() for samples in asked.values() for s in samples if s.image)


@pytest.mark.parametrize(
    "task", ["hallucination", "hallucination_zh", "hallucination_choice", "hallucination_choice_zh"]
)
def test_the_words_alone_say_nothing(asked: dict[str, list[Sample]], task: str) -> None:
    by_words: dict[tuple, Counter[str]] = {}
    for s in asked[task]:
        by_words.setdefault((s.prompt, tuple(sorted(s.choices))), Counter())[s.answer] += 1
    assert all(len(answers) == 2 and len(set(answers.values())) == 1 for answers in by_words.values())
    if "choice" not in task:
        by_picture: dict[str | None, Counter[str]] = {}
        for s in asked[task]:
            by_picture.setdefault(s.image, Counter())[s.answer] += 1
        assert all(len(answers) == 2 and len(set(answers.values())) == 1 for answers in by_picture.values())


def test_partners_share_their_words_and_differ_in_truth(asked: dict[str, list[Sample]]) -> None:
    for task in ("hallucination", "hallucination_zh"):
        partners: dict[str, list[Sample]] = {}
        for s in asked[task]:
            partners.setdefault(s.truth["question"], []).append(s)
            assert parse_yes_no(s.answer) == ("yes" if s.truth["true"] else "no")
        for one, two in partners.values():
            assert one.prompt == two.prompt
            assert one.image != two.image
            assert one.truth["true"] != two.truth["true"]


def test_questions_read_well_and_are_true(asked: dict[str, list[Sample]]) -> None:
    english = {s.prompt for s in asked["hallucination"]}
    for shape in (" there ", " card?", "larger than the", "exactly", "upside down?", "left of the", "below the"):
        assert any(shape in prompt for prompt in english), shape
    assert not any("{" in prompt or "  " in prompt for prompt in english)
    for task, names in (("hallucination", NAMES_EN), ("hallucination_zh", NAMES_ZH)):
        for s in (s for s in asked[task] if s.truth["dimension"] == "existence"):
            name = next(n for n in names if n in s.prompt.replace("there", ""))
            assert (name in s.truth["objects"]) == s.truth["true"]
    assert all(any("一" <= c <= "鿿" for c in s.prompt) for s in asked["hallucination_zh"])


def test_a_caption_names_all_that_is_there(asked: dict[str, list[Sample]]) -> None:
    for task in ("hallucination_caption", "hallucination_caption_zh"):
        for s in asked[task]:
            assert len(s.truth["objects"]) == 3
            assert all(name in s.answer for name in s.truth["objects"])
            assert set(s.truth["objects"]) < set(s.truth["vocabulary"])
