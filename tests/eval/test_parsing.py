"""Answers that public parsers read differently: ours beside theirs, bugs included (`spec/evaluation.md` A1)."""

from __future__ import annotations

import pytest

import fastmllm.eval
from fastmllm.eval.parsing import normalise, parse_choice, parse_count, parse_yes_no

# text: ours, POPE and LLaVA, lmms-eval, VLMEvalKit
TABLE = [
    ("Yes, there is a dog.", "yes", "yes", None, "yes"),
    ("There is not a dog in the image.", "no", "no", None, None),
    ("There isn't any dog.", "no", "yes", None, None),
    ("The image shows two cats. No dog is visible.", "no", "yes", None, "no"),
    ("NO", "no", "yes", "no", "no"),
    ("Yes, and there is no cat.", "yes", "no", None, None),
    ("", None, "yes", None, None),
    ("I cannot tell.", None, "yes", None, None),
    ("是的", "yes", "yes", None, None),
    ("no", "no", "no", "no", "no"),
    (" Yes\n", "yes", "yes", "yes", "yes"),
]


@pytest.mark.parametrize("text, ours, pope, lmms, vlm", TABLE)
def test_yes_no_beside_the_published_rules(text, ours, pope, lmms, vlm):
    read = [parse_yes_no(text, compat=c) for c in (None, "pope", "lmms-eval", "vlmevalkit")]
    assert read == [ours, pope, lmms, vlm]


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("There isn’t any dog.", "no"),
        ("Answer: **No**", "no"),
        ("The answer is yes.", "yes"),
        ("False", "no"),
        ("There is actually no dog.", "no"),
        ("The image does not contain a dog.", "no"),
        ("There is a dog with no collar.", None),
        ("There is a dog. No cat.", None),
        ("There is a dog.", None),
        ("No doubt there is a dog.", None),
        ("Yes and no.", None),
        ("yes/no", None),
        ("It is not clear whether there is a dog.", None),
        ("I'm sorry, there is no way to tell.", None),
        ("notable", None),
        ("不是。", "no"),
        ("没有，图中没有狗。", "no"),
        ("没错", "yes"),
        ("图片中没有狗。", "no"),
        ("图中并没有猫", "no"),
        ("有的，有一只狗。", "yes"),
        ("答案是：否", "no"),
        ("不确定", None),
        ("无法判断", None),
        ("是不是狗？", None),
    ],
)
def test_yes_no(text, verdict):
    assert parse_yes_no(text) == verdict


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="known: pope, lmms-eval, vlmevalkit"):
        parse_yes_no("yes", compat="mme")
    with pytest.raises(ValueError, match="known: llava, lmms-eval, vlmevalkit"):
        parse_choice("A", ["x"], compat="mme")
    assert fastmllm.eval.parse_yes_no is parse_yes_no


@pytest.mark.parametrize(
    "text, choice",
    [
        ("An Apple.", "apple"),
        ("it is a green apple", "green apple"),
        ("apple or pear", None),
        ("pineapple", None),
        ("", None),
        ("苹果。", "苹果"),
    ],
)
def test_choice(text, choice):
    assert parse_choice(text, ["apple", "green apple", "pear", "苹果"]) == choice


OPTIONS = ["red", "blue", "a kite"]
# text: ours, LLaVA, lmms-eval, VLMEvalKit
LETTERED = [
    ("B", "blue", "blue", "blue", "blue"),
    ("b", "blue", None, "blue", None),
    ("(B)", "blue", None, None, "blue"),
    ("B)", "blue", None, None, "blue"),
    ("B. blue", "blue", "blue", "blue", "blue"),
    ("B.", "blue", None, "blue", "blue"),
    ("The answer is B.", "blue", "blue", None, "blue"),
    ("The answer is B", "blue", None, None, "blue"),
    ("blue", "blue", None, None, "blue"),
    ("B. red", None, "blue", "blue", "blue"),
    ("E", None, None, None, None),
    ("A kite", "a kite", None, None, "red"),  # VLMEvalKit takes the article for the letter
    ("答案是B", "blue", None, None, None),
    ("red or blue", None, None, None, None),
    ("Cannot determine the answer", None, None, None, None),
    ("infrared", None, None, None, "red"),
    ("B is what I would pick, given all of this", None, None, None, None),  # not among VLMEvalKit's last tokens
]


@pytest.mark.parametrize("text, ours, llava, lmms, vlm", LETTERED)
def test_lettered_choices_beside_the_published_rules(text, ours, llava, lmms, vlm):
    theirs = [parse_choice(text, OPTIONS, compat=c) for c in ("llava", "lmms-eval", "vlmevalkit")]
    assert [parse_choice(text, OPTIONS, letters=True), *theirs] == [ours, llava, lmms, vlm]


def test_a_choice_of_one_character_is_no_letter_unless_the_prompt_lettered_it():
    assert parse_choice("B", ["C", "B", "A"]) == "B"
    assert parse_choice("B", ["C", "x", "A"], letters=True) == "x"


@pytest.mark.parametrize(
    "text, count",
    [
        ("3", 3),
        ("There are three dogs.", 3),
        ("three (3)", 3),
        ("two or three", None),
        ("There are no dogs", 0),
        ("1,200 people", 1200),
        ("1.5", None),
        ("-2", None),
        ("many", None),
        ("有十二只", 12),
        ("两只", 2),
        ("三十", 30),
        ("没有狗", 0),
    ],
)
def test_count(text, count):
    assert parse_count(text) == count


def test_normalise_folds_width_and_article():
    assert normalise(" The  Ｒed-Apple! ") == "red-apple"
