from __future__ import annotations

from collections import Counter

import pytest

from fastmllm.data.tasks import Subject, ask, be, negatives, with_article

FRUIT = ("banana", "grapes", "orange")
TOOLS = ("hammer", "wrench")


def subject(name: str, group: str, index: int = 0, team: str = "noto") -> Subject:
    return Subject(
        key=f"{team}/{name}-{index}",
        path=f"{team}/{name}-{index}.png",
        concept=name,
        source=team,
        group=group,
        names={"en": name, "zh": f"{name}物"},
    )


def world(num: int = 2) -> list[Subject]:
    pairs = [(name, "fruit") for name in FRUIT] + [(name, "tool") for name in TOOLS]
    return [subject(name, group, i) for name, group in pairs for i in range(num)]


@pytest.mark.parametrize(
    ("name", "phrase", "verb"),
    [
        ("red apple", "a red apple", "is"),
        ("owl", "an owl", "is"),
        ("unicorn", "a unicorn", "is"),
        ("umbrella", "an umbrella", "is"),
        ("grapes", "grapes", "are"),
        ("bus", "a bus", "is"),
        ("dress", "a dress", "is"),
        ("skis", "skis", "are"),
        ("tennis", "tennis", "is"),
        ("bread", "bread", "is"),
    ],
)
def test_english_phrases(name: str, phrase: str, verb: str) -> None:
    assert with_article(name) == phrase
    assert be(name) == verb


def test_negatives_come_from_the_group_and_are_as_frequent_as_answers() -> None:
    groups = dict.fromkeys("abcde", "fruit") | dict.fromkeys("fgh", "tool") | {"i": "lone", "j": "alone"}
    found = negatives(groups, seed=0)
    assert found == negatives(groups, seed=0) != negatives(groups, seed=1)
    for concept, others in found.items():
        assert concept not in others
        assert len(others) == len(set(others))
    assert set(found["a"]) == set("bcde")
    assert found["i"] == ["j"]  # groups of one ask for each other
    for k in range(2):  # each concept is the k-th negative exactly once, within its circle
        counts = Counter(others[k] for concept, others in found.items() if len(others) > k)
        assert set(counts.values()) == {1}


def test_a_single_lone_group_joins_the_largest() -> None:
    found = negatives({"a": "x", "b": "x", "c": "x", "d": "y"}, seed=0)
    assert set(found["d"]) == {"a", "b", "c"}
    with pytest.raises(ValueError, match="at least two concepts"):
        negatives({"a": "x"}, seed=0)


def test_every_question_is_asked_of_every_image() -> None:
    tasks = ask(world(), split="train", languages=("en", "zh"))
    sizes = {task: len(samples) for task, samples in tasks.items()}
    assert sizes == {
        "name": 10,
        "name_zh": 10,
        "group": 10,
        "group_zh": 10,
        "caption": 10,
        "exists": 10,
        "yes_no": 20,
    }
    every = [sample for samples in tasks.values() for sample in samples]
    assert len({sample.id for sample in every}) == len(every)
    grapes = next(sample for sample in tasks["caption"] if sample.truth["name"] == "grapes")
    assert grapes.answer == grapes.references[0] == "a drawing of grapes, fruit"
    chinese = tasks["name_zh"][0]
    assert (chinese.task, chinese.language, chinese.answer) == ("name", "zh", "banana物")
    assert tasks["group_zh"][0].answer == "水果"


def test_existence_is_exact_balanced_and_not_solvable_by_name() -> None:
    tasks = ask(world(4), split="eval", num_negatives=2)
    for sample in tasks["exists"]:
        right, wrong = sample.choices
        assert right == sample.answer == sample.truth["name"]
        assert wrong == sample.truth["absent"] not in sample.truth["objects"]
    assert Counter(s.choices[0] for s in tasks["exists"]) == Counter(s.choices[1] for s in tasks["exists"])
    by_name: dict[str, Counter[str]] = {}
    for sample in tasks["yes_no"]:
        assert (sample.truth["asked"] in sample.truth["objects"]) == (sample.answer == "yes")
        by_name.setdefault(sample.truth["asked"], Counter())[sample.answer] += 1
    assert all(counts["yes"] == counts["no"] for counts in by_name.values())


def test_training_meets_several_negatives_of_a_concept() -> None:
    tasks = ask(world(4), split="train")
    absent = {s.truth["absent"] for s in tasks["exists"] if s.truth["name"] == "banana"}
    assert absent == {"grapes", "orange"}


def test_photographs_have_no_group_tasks() -> None:
    photos = [
        Subject(key=name, path=name, concept=name, source="train", group="", names={"en": name}, kind="photo")
        for name in ("hat", "shoe")
    ]
    assert set(ask(photos, split="train", languages=("en", "zh"))) == {"name", "exists", "yes_no"}
