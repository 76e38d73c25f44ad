"""What stages of pairs refuse to be."""

from __future__ import annotations

from typing import Any

import pytest

from fastmllm.train.pairs import ContrastiveConfig, MatchingConfig
from fastmllm.train.stages import StageConfig


@pytest.mark.parametrize(
    "make, wrong, message",
    [
        (ContrastiveConfig, {"loss": "triplet"}, "choose one of clip, siglip"),
        (ContrastiveConfig, {"width": 0}, "width"),
        (ContrastiveConfig, {"text_tokens": 1}, "a caption and its end"),
        (MatchingConfig, {"text_tokens": 2}, "between its start and its end"),
        (MatchingConfig, {"temperature": 0.0}, "temperature"),
        (MatchingConfig, {"smoothing": 1.0}, "smoothing"),
    ],
)
def test_bad_values(make: Any, wrong: dict[str, Any], message: str) -> None:
    make()
    with pytest.raises(ValueError, match=message):
        make(**wrong)


@pytest.mark.parametrize("kind", ["contrastive", "qformer"])
@pytest.mark.parametrize("wrong", [{"visual_tokens": (4,)}, {"max_tokens": 8, "max_images": 1}])
def test_what_pairs_have_no_use_for(kind: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"visual_tokens and balance_steps|kind instruct"):
        StageConfig(name="s", kind=kind, steps=1, trainable={"vision": 1.0}, **wrong)
