"""CIDEr-D and CHAIR: numbers of the reference implementations and the degenerate corners."""

from __future__ import annotations

import pytest

from fastmllm.eval.captions import chair, cider, mentioned

CANDIDATES = ["a red apple on a plate", "a dog runs in the park", "", "a cat", "红苹", "a a a a a a"]
REFERENCES = [
    ["a red apple lies on a white plate", "an apple on a plate"],
    ["a dog runs in the park"],
    ["a blue car"],
    ["a cat", "a small cat sleeps"],
    ["苹红"],
    ["a bird in a tree"],
]
# pycocoevalcap 1.2's CiderScorer on the same lines, the Chinese ones split by hand into "红 苹" and "苹 红"
PUBLISHED = [4.771864, 10.0, 0.0, 3.185032, 2.5, 0.107573]


def test_cider_equals_pycocoevalcap():
    assert cider(CANDIDATES, REFERENCES) == pytest.approx(PUBLISHED, abs=1e-5)


def test_cider_corners():
    assert cider(["a red apple"], [["a red apple"]]) == [0.0]  # one image: every n-gram is in every document
    assert cider([], []) == []
    two_words = cider(["red apple", "blue car"], [["red apple"], ["blue car"]])
    assert two_words == pytest.approx([5.0, 5.0])  # no 3- and 4-grams
    with pytest.raises(ValueError, match="each needs one or more"):
        cider(["a"], [[]])


VOCABULARY = {"dog": "dog", "puppy": "dog", "hot dog": "hot dog", "cat": "cat"}


def test_the_longest_name_is_the_object():
    assert mentioned("A hot dog and a puppy, no Cat!", VOCABULARY) == ["hot dog", "dog", "cat"]


def test_chair_counts_mentions_captions_and_recall():
    got = chair(["a dog and a dog and a cat", "a hot dog", "nothing"], [{"dog"}, {"hot dog"}, {"cat"}], VOCABULARY)
    assert (got.mentions, got.hallucinated, got.hallucinated_captions, got.recalled, got.objects) == (4, 1, 1, 2, 3)
    assert got.instance == 0.25
    assert got.sentence == pytest.approx(1 / 3)
    assert got.recall == pytest.approx(2 / 3)
    assert chair([], [], VOCABULARY).instance == 0.0
