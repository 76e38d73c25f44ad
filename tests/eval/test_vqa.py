"""VQA's normalisation and accuracy: the official script's corners, and where we part from it."""

from __future__ import annotations

import pytest

from fastmllm.eval.vqa import normalise_answer, strip_punctuation, vqa_accuracy


@pytest.mark.parametrize(
    "text, folded",
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the table's own slip
        ("shes", "shes"),  # not in the table
        ("red-white", "red white"),
        ("red- white", "red white"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("yes\n", "yes"),
        ("a  an the", ""),
    ],
)
def test_normalise_answer(text, folded):
    assert normalise_answer(text) == folded


def test_only_the_first_32_full_stops_go():
    assert strip_punctuation("." * 40) == "." * 8


def test_accuracy_leaves_one_annotator_out():
    """The published closed form: with m of 10 matching, (m min(1, (m-1)/3) + (10-m) min(1, m/3)) / 10."""
    for m in range(11):
        answers = ["cat"] * m + [f"dog {i}" for i in range(10 - m)]
        expected = (m * min(1, max(0, m - 1) / 3) + (10 - m) * min(1, m / 3)) / 10
        assert vqa_accuracy("a Cat", answers) == pytest.approx(expected)
    assert vqa_accuracy("cat", ["cat"]) == 1.0


def test_the_official_script_normalises_nothing_where_all_agree():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 10, compat="vqa") == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"], compat="vqa") == 1.0
    with pytest.raises(ValueError, match="no answers"):
        vqa_accuracy("x", [])
    with pytest.raises(ValueError, match="known: vqa"):
        vqa_accuracy("x", ["x"], compat="gqa")
