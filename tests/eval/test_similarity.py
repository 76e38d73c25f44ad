"""Retrieval and CLIPScore on embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from fastmllm.eval.similarity import clip_score, ranks, recall_at


def test_ranks_against_sorting():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6, 30))
    truths = [set(range(5 * i, 5 * i + 5)) for i in range(6)]
    order = np.argsort(-scores, axis=1)
    expected = [next(p for p, column in enumerate(row) if column in t) for row, t in zip(order, truths, strict=True)]
    assert ranks(scores, truths) == expected
    assert recall_at(scores, truths, 1) == [e < 1 for e in expected]
    assert sum(recall_at(scores, truths, 30)) == 6


def test_equal_scores_and_nan_are_no_knowledge():
    assert ranks(np.zeros((2, 10)), [{0}, {3}]) == [9, 9]
    assert ranks(np.array([[np.nan, 1.0]]), [{0}]) == [1]
    with pytest.raises(ValueError, match=r"query 0 has right answers \[7\] in a gallery of 2"):
        ranks(np.zeros((1, 2)), [{7}])
    with pytest.raises(ValueError, match="1 queries, 2 sets"):
        ranks(np.zeros((1, 2)), [{0}, {1}])


def test_clip_score_says_its_scaling():
    images, texts = np.array([[2.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 1.0], [-3.0, 0.0]])
    half = np.sqrt(0.5)
    assert clip_score(images, texts) == pytest.approx([2.5 * half, 0.0])
    assert clip_score(images, texts, "torchmetrics") == pytest.approx([100 * half, 0.0])
    assert clip_score(images, texts, "cosine") == pytest.approx([half, -1.0])
    with pytest.raises(ValueError, match="known: clipscore"):
        clip_score(images, texts, "cos")
    with pytest.raises(ValueError, match="zero or not finite"):
        clip_score(images, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="a pair a row"):
        clip_score(images, texts[:1])
