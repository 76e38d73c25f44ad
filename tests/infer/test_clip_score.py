"""Pair scores are cosines of the towers' features, pair by pair, and fit a filter."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_vlm import tiny_tokenizer, tiny_vlm

from fastmllm.infer.clip_score import ClipScorer
from fastmllm.models.dual_encoder import DualEncoder


@pytest.fixture
def scorer() -> ClipScorer:
    vlm = tiny_vlm(0)
    model = DualEncoder(vlm.vision, vlm.language, 12).eval()
    return ClipScorer(model, tiny_tokenizer(), image_size=32, max_tokens=6, last=(0,))


def test_scores_are_raw_cosines_of_pairs(scorer: ClipScorer, tmp_path: Path) -> None:
    images = []
    for i in range(3):
        Image.new("RGB", (20 + i, 30), (80 * i, 200 - 90 * i, 40)).save(tmp_path / f"{i}.png")
        images.append(str(tmp_path / f"{i}.png"))
    texts = ["red apple", "", "what is this?"]
    together = scorer(images, texts)
    assert math.isnan(together[1])
    assert all(-1.0 <= together[i] <= 1.0 for i in (0, 2))
    alone = [scorer([image], [text])[0] for image, text in zip(images, texts, strict=True)]
    assert [together[0], together[2]] == pytest.approx([alone[0], alone[2]], abs=1e-5)
    swapped = scorer([images[2], images[0]], [texts[0], texts[2]])
    assert abs(swapped[0] - together[0]) > 1e-6
    with torch.no_grad():  # a feature's length does not matter
        scorer.model.image_head.weight *= 7
    assert scorer(images[:1], texts[:1]) == pytest.approx(together[:1], abs=1e-5)
    assert scorer(images[:1], [""]) != scorer(images[:1], [""])  # nan
