"""What the kinds of stage that learn from pairs of an image and a caption say of themselves in a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastmllm.models.dual_encoder import LOSSES
from fastmllm.models.language import LanguageConfig

PAIR_KINDS = ("contrastive", "qformer")


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveConfig:
    """Two towers whose features of a pair are alike.

    Args:
        loss: "clip" (softmax) or "siglip" (sigmoid).
        width: of the features.
        text_tokens: longest caption, with its end token; the rest is cut off.
        text: a text tower of its own, fresh, with its head tied; None = the model's language model.
    """

    loss: str = "clip"
    width: int = 256
    text_tokens: int = 64
    text: LanguageConfig | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"contrastive: loss is {self.loss!r}; choose one of {', '.join(LOSSES)}")
        if self.width < 1 or self.text_tokens < 2:
            raise ValueError(
                f"contrastive: width ({self.width}) must be positive, text_tokens ({self.text_tokens}) at least 2: a "
                "caption and its end"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchingConfig:
    """BLIP-2's first stage: the model's Q-Former learns to contrast, match and write captions.

    Args:
        width: of the features.
        temperature: what the learned temperature of the contrast starts from.
        smoothing: of the labels of contrast and captions.
        text_tokens: longest caption, with the tokens around it; the rest is cut off.
    """

    width: int = 256
    temperature: float = 0.07
    smoothing: float = 0.1
    text_tokens: int = 32

    def __post_init__(self) -> None:
        if self.width < 1 or self.text_tokens < 3:
            raise ValueError(
                f"qformer: width ({self.width}) must be positive, text_tokens ({self.text_tokens}) at least 3: a "
                "caption between its start and its end"
            )
        if not 0 < self.temperature < math.inf or not 0 <= self.smoothing < 1:
            raise ValueError(
                f"qformer: temperature ({self.temperature}) must be positive, smoothing ({self.smoothing}) in [0, 1)"
            )
