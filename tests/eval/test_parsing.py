"""Answers that public parsers read differently (POPE, lmms-eval, VLMEvalKit disagree on every line here)."""

from __future__ import annotations

import pytest

from fastmllm.eval.parsing import normalise, parse_choice, parse_yes_no


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("Yes, there is a dog.", "yes"),
        ("There is not a dog in the image.", "no"),
        ("There isn’t any dog.", "no"),
        ("NO", "no"),
        ("Yes, and there is no cat.", "yes"),
        ("", None),
        ("I cannot tell.", None),
        ("是的", None),
        ("notable", None),
        ("There is a dog.", None),
    ],
)
def test_yes_no(text, verdict):
    assert parse_yes_no(text) == verdict


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


def test_normalise_folds_width_and_article():
    assert normalise(" The  Ｒed-Apple! ") == "red-apple"
