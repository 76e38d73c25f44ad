"""What a language model writes is parsed, checked and kept with its origin; what it costs is never paid twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastmllm.data.instruct.checks import fault, leaks, parse_pairs
from fastmllm.data.instruct.prompt_files import SHIPPED, load_prompt
from fastmllm.data.instruct.replies import ModelDown, Replies
from fastmllm.data.instruct.self_instruct import SelfInstructConfig, self_instruct
from fastmllm.data.records import Record
from fastmllm.data.shard_index import Skipped

FACTS = {"image": "a.png", "caption": "A dog on a red mat.", "id": "d"}


class Model:
    """A model that says what it is told to, and remembers what it was asked."""

    def __init__(self, *replies: str | Exception) -> None:
        self.replies, self.asked = list(replies), []

    def __call__(self, messages):
        self.asked.append(messages)
        reply = self.replies[(len(self.asked) - 1) % len(self.replies)]
        if isinstance(reply, Exception):
            raise reply
        return reply


def pairs(*said: str) -> str:
    """Question, answer, question, answer, ... as a model writes them."""
    return "\n===\n".join(f"{('Question', 'Answer')[i % 2]}: {text}" for i, text in enumerate(said))


def made(model: Model, tmp: Path, *data: dict, config: SelfInstructConfig | None = None, labels=(), **more: object):
    replies = Replies(tmp / "replies.sqlite", "toy-1", pause_s=0.0, **more)
    records = [Record(key=str(i), data=d) for i, d in enumerate(data)]
    prompt = load_prompt("conversation_en")
    return list(self_instruct(records, prompt, model, replies, config, labels=labels, source="s"))


def test_a_reply_becomes_a_conversation_with_its_origin(tmp_path: Path) -> None:
    model = Model(pairs("What lies on the mat?", "A dog lies there.", "What colour is the mat?", "It is red."))
    (sample,) = made(model, tmp_path, FACTS)
    assert sample["conversations"] == [
        {"from": "human", "value": "<image>\nWhat lies on the mat?"}, {"from": "gpt", "value": "A dog lies there."},
        {"from": "human", "value": "What colour is the mat?"}, {"from": "gpt", "value": "It is red."},
    ]  # fmt: skip
    assert sample["made"] == {"by": "self-instruct", "model": "toy-1", "prompt": "conversation_en", "from": "d"}
    roles = [message["role"] for message in model.asked[0]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert model.asked[0][-1]["content"] == "A dog on a red mat."


def test_bad_pairs_are_listed_one_by_one(tmp_path: Path) -> None:
    said = [
        *("What lies on the mat?", "A dog.", "What lies on the red mat?", "A brown dog."),
        *(
            "Where is the red mat?",
            "Red mat.",
            "What is its name?",
            "Rex.",
            "How big is it?",
            "It cannot be determined.",
        ),
        *("What does the caption say?", "According to the caption, a dog.", "What does the cat do?", "It sleeps."),
        *("Is there a cat?", "No, there is none."),
    ]
    found = made(Model(pairs(*said)), tmp_path, FACTS, labels=("cat", "dog"))
    assert {item.key: item.reason for item in found if isinstance(item, Skipped)} == {
        "0/1": "repeated question", "0/2": "answer in the question", "0/3": "image cannot answer",
        "0/4": "uncertain answer", "0/5": "speaks of its source", "0/6": "asks for what is not there",
    }  # fmt: skip
    asked = [turn["value"] for turn in found[-1]["conversations"][0::2]]
    assert asked == ["<image>\nWhat lies on the mat?", "Is there a cat?"]


def test_replies_that_are_no_pairs_and_records_without_facts(tmp_path: Path) -> None:
    model = Model("I cannot see images.", pairs("What?"), "Answer: x\n===\nQuestion: y")
    rows = [FACTS | {"caption": f"A dog, take {i}."} for i in range(3)]
    found = made(model, tmp_path, *rows, {"image": "a.png"}, {"caption": "no image"})
    assert [item.reason for item in found] == ["unparsed reply"] * 3 + ["wrong columns", "wrong images"]
    assert len(model.asked) == 3


def test_nothing_is_asked_twice_and_a_failing_model_stops_the_run(tmp_path: Path) -> None:
    rows = [FACTS | {"caption": f"A dog, take {i}."} for i in range(4)]
    good = pairs("What is this?", "A dog.")
    first = Model(good, TimeoutError("slow"), good, *[TimeoutError("slow")] * 4)
    found = made(first, tmp_path, *rows, retries=1)
    assert [isinstance(item, dict) for item in found] == [True, True, False, False]
    assert found[2].reason == "model failed"
    second = Model(good)
    assert all(isinstance(item, dict) for item in made(second, tmp_path, *rows))
    assert len(second.asked) == 2  # the two that failed
    flaky = Model(OSError("down"), good)
    found = made(flaky, tmp_path / "flaky", *rows, *rows[:2], retries=0, give_up=2)
    assert len(found) == 6  # one failure after each success is no end
    with pytest.raises(ModelDown, match="2 questions failed in a row"):
        made(
            Model(OSError("down")), tmp_path, *[FACTS | {"caption": f"new {i}"} for i in range(5)], retries=0, give_up=2
        )


def test_questions_that_repeat_over_images_or_need_no_image(tmp_path: Path) -> None:
    rows = [FACTS | {"caption": f"A dog, take {i}."} for i in range(3)]
    found = made(Model(pairs("What is this?", "A dog.")), tmp_path, *rows, config=SelfInstructConfig(max_repeats=2))
    assert [getattr(item, "reason", "") for item in found] == ["", "", "asked too often"]
    model = Model(pairs("How many legs has a dog?", "Four."), "four", pairs("What is this?", "A dog."), "A house.")
    found = made(model, tmp_path / "b", *rows[:2], config=SelfInstructConfig(blind=True))
    assert [getattr(item, "reason", "") for item in found] == ["answered without the image", ""]


def test_parsing_takes_both_languages_and_nothing_half() -> None:
    assert parse_pairs("问题：有几只狗？\n===\n回答：两只。\n===\n") == [("有几只狗？", "两只。")]
    assert parse_pairs("Question: a\nb\n====\nAnswer: c") == [("a\nb", "c")]
    for bad in ("", "Question: a\n===\nAnswer: b\n===\nQuestion: c", "Sure!\n===\nQuestion: a\n===\nAnswer: b"):
        assert parse_pairs(bad) == []


@pytest.mark.parametrize(
    "question, answer, leak",
    [
        ("What colour is the red car?", "Red.", True), ("Is the car red?", "Yes.", False),
        ("Yes or what?", "yes", False),
        ("Does the sign say yes?", "Yes.", False),
        ("Is it a dog or a cat?", "A cat.", False), ("What is on the mat?", "A dog.", False),
        ("红色的车是什么颜色？", "红色", True), ("是猫还是狗？", "猫", False), ("What is it?", "It is.", False),
    ],
)  # fmt: skip
def test_answers_in_their_questions(question: str, answer: str, leak: bool) -> None:
    assert leaks(question, answer) == leak


@pytest.mark.parametrize(
    "question, answer, reason",
    [
        ("价格是多少？", "十元。", "image cannot answer"), ("他在做什么？", "无法确定。", "uncertain answer"),
        ("狗在哪里？", "根据描述，在垫子上。", "speaks of its source"),
        ("猫在做什么？", "在睡觉。", "asks for what is not there"),
        ("图中有猫吗？", "没有猫。", None), ("What are the dogs doing?", "They play.", None),
        ("What are the cats doing?", "They play.", "asks for what is not there"),
    ],
)  # fmt: skip
def test_faults_in_both_languages(question: str, answer: str, reason: str | None) -> None:
    found = fault(question, answer, facts="a dog 一只狗", labels=("dog", "cat", "狗", "猫"))
    assert (found and found[0]) == reason


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_seeds_follow_their_own_rules(name: str) -> None:
    prompt = load_prompt(name)
    for facts, reply in prompt.seeds:
        found = parse_pairs(reply)
        assert found, reply
        assert [fault(q, a, facts=facts) for q, a in found] == [None] * len(found)


def test_wrong_prompt_files_are_refused(tmp_path: Path) -> None:
    for text in ("a: 1", "- x", "{language: en, system: s, user: u, seeds: []}", "x: ["):
        (tmp_path / "p.yaml").write_text(text)
        with pytest.raises(ValueError, match="facts"):
            load_prompt(tmp_path / "p.yaml")
    with pytest.raises(ValueError, match="conversation_en"):
        load_prompt("none")
    assert json.dumps(load_prompt("detail_en").seeds)
