"""Scores of embeddings: retrieval R@k and CLIPScore, of whatever encoder they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

SCALES = {"clipscore": 2.5, "torchmetrics": 100.0, "cosine": 1.0}


def ranks(scores: np.ndarray, truths: Sequence[set[int]]) -> list[int]:
    """Return where the best right answer of each query stands, from 0; among equal scores it stands last.

    Args:
        scores: (Q, N), query against gallery, more is better; NaN counts as the worst.
        truths: the right columns of each query, at least one (Flickr30k: five captions an image).

    Raises:
        ValueError: sizes differ, or a query has no right answer in the gallery.
    """
    scores = np.where(np.isnan(scores), -np.inf, np.asarray(scores, float))
    if len(scores) != len(truths):
        raise ValueError(f"ranks: {len(scores)} queries, {len(truths)} sets of right answers")
    places = []
    for query, (row, right) in enumerate(zip(scores, truths, strict=True)):
        if not right or min(right) < 0 or max(right) >= len(row):
            raise ValueError(f"ranks: query {query} has right answers {sorted(right)} in a gallery of {len(row)}")
        wrong = np.delete(row, sorted(right))
        places.append(int((wrong >= row[sorted(right)].max()).sum()))
    return places


def recall_at(scores: np.ndarray, truths: Sequence[set[int]], k: int) -> list[bool]:
    """Tell for each query whether a right answer is among the best `k`."""
    return [rank < k for rank in ranks(scores, truths)]


def clip_score(
    images: np.ndarray, texts: np.ndarray, scale: Literal["clipscore", "torchmetrics", "cosine"] = "clipscore"
) -> np.ndarray:
    """Score pairs of an image's and a text's embedding.

    Args:
        images, texts: (N, D) of one contrastive encoder, of any length.
        scale: "clipscore": 2.5 max(cos, 0) (Hessel et al., arXiv 2104.08718); "torchmetrics": max(100 cos, 0);
            "cosine": the cosine itself (DataComp's filter). Say which beside the figure.

    Returns:
        (N,) fp64.

    Raises:
        ValueError: other shapes, an embedding of length 0 or not finite, or an unknown scale.
    """
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(f"clip_score: images {images.shape} and texts {texts.shape} must be (N, D), a pair a row")
    if scale not in SCALES:
        raise ValueError(f"clip_score: scale {scale!r} is unknown; known: {', '.join(SCALES)}")
    lengths = [np.linalg.norm(np.asarray(e, float), axis=1) for e in (images, texts)]
    if not all(np.isfinite(n).all() and (n > 0).all() for n in lengths):
        raise ValueError("clip_score: an embedding is zero or not finite; leave its pair out")
    cosine = (np.asarray(images, float) * np.asarray(texts, float)).sum(1) / (lengths[0] * lengths[1])
    return cosine if scale == "cosine" else SCALES[scale] * np.maximum(cosine, 0.0)
