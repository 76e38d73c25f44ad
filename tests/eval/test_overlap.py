"""BLEU and ROUGE-L: numbers of pycocoevalcap 1.2 and sacreBLEU 2.6, the same libraries where installed, and corners."""

from __future__ import annotations

import random

import pytest

from fastmllm.eval.intervals import statistic
from fastmllm.eval.overlap import bleu, bleu_counts, bleu_of, rouge_l

CANDIDATES = ["a red apple on a plate", "a dog runs in the park", "", "a cat", "红苹", "a a a a a a"]
REFERENCES = [
    ["a red apple lies on a white plate", "an apple on a plate"],
    ["a dog runs in the park"],
    ["a blue car"],
    ["a cat", "a small cat sleeps"],
    ["苹红"],
    ["a bird in a tree"],
]
WORDS = ["a", "red", "dog", "cat", "runs", "in", "the", "park", "on"]
BLEU = [0.7818243023302486, 0.695274234720979, 0.6458963084101864, 0.58162264577602]
ROUGE = [0.8714285714285713, 1.0, 0.0, 1.0, 0.5, 0.3696969696969697]


def test_bleu_equals_the_published_scorers():
    assert [bleu(CANDIDATES, REFERENCES, n) for n in (1, 2, 3, 4)] == pytest.approx(BLEU, abs=1e-6)


def test_rouge_equals_pycocoevalcap():
    scores = [rouge_l(c, r) for c, r in zip(CANDIDATES, REFERENCES, strict=True)]
    assert scores == pytest.approx(ROUGE, abs=1e-12)


def _lines(seed):
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(80)]
    return lines[:20], [lines[20 + 3 * i : 23 + 3 * i] for i in range(20)]


def test_bleu_equals_sacrebleu():
    metrics = pytest.importorskip("sacrebleu.metrics")
    texts, references = _lines(0)
    theirs = metrics.BLEU(smooth_method="none", tokenize="none", force=True)
    score = theirs.corpus_score(texts, [list(column) for column in zip(*references, strict=True)]).score
    assert 100 * bleu(texts, references) == pytest.approx(score)


def test_rouge_recall_and_precision_equal_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    texts, references = _lines(1)
    for text, refs in zip(texts, references, strict=True):
        found = scorer.score(refs[0], text)["rougeL"]
        p, r = found.precision, found.recall
        expected = (1 + 1.44) * p * r / (r + 1.44 * p) if p and r else 0.0
        assert rouge_l(text, refs[:1]) == pytest.approx(expected)


def test_corners():
    assert bleu([], []) == 0.0
    assert bleu_counts("a b c d e f", ["a b c", "a b c d e f g"])["reference length"] == 7.0  # the closest
    assert bleu(["a b"], [["a b"]]) == 0.0  # no 3-grams: unsmoothed
    assert bleu(["a b"], [["a b"]], order=2) == 1.0
    assert rouge_l("", ["a"]) == rouge_l("b", ["a"]) == rouge_l("a", [""]) == 0.0
    with pytest.raises(ValueError, match="each needs one or more"):
        bleu(["a"], [[]])


def test_bleu_has_an_interval_over_images():
    texts, references = _lines(2)
    counts = [bleu_counts(t, r) for t, r in zip(texts, references, strict=True)]
    found = statistic(counts, lambda s: bleu_of(s, 2), clusters=[i // 2 for i in range(20)])
    assert found.value == pytest.approx(bleu(texts, references, 2))
    assert found.low < found.value < found.high
