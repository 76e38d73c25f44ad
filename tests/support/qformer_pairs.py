"""A tiny Q-Former with its first-stage heads, and four pairs of images and captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmllm.modules.qformer import ImageTokens, PackedText, QFormer, QFormerConfig
from fastmllm.modules.qformer_losses import QFormerPretraining

Q, D, MEDIA, VOCAB, BOS = 3, 16, 10, 30, 29
IMAGES, TEXTS = [4, 4, 2, 3], [5, 5, 2, 4]
CONFIG = QFormerConfig(
    width=D, depth=3, num_heads=2, mlp_width=24, media_width=MEDIA, num_queries=Q, vocab_size=VOCAB, max_positions=8
)


def bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def model(dtype: torch.dtype) -> QFormerPretraining:
    torch.manual_seed(0)
    result = QFormerPretraining(QFormer(CONFIG), feature_width=6)
    for name, parameter in result.named_parameters():
        if name != "temperature":
            nn.init.normal_(parameter, std=0.3)
    return result.to(dtype)


def batch(chosen: Sequence[int], dtype: torch.dtype) -> tuple[ImageTokens, PackedText, Tensor]:
    """Return the chosen pairs; pairs 0 and 3 are captions of one image. The longest are those of all four."""
    torch.manual_seed(1)
    images = torch.randn(sum(IMAGES), MEDIA, dtype=torch.float64).to(dtype).split(IMAGES)
    texts = torch.randint(1, VOCAB - 1, (sum(TEXTS),)).split(TEXTS)
    tokens = torch.cat([images[k] for k in chosen]).requires_grad_()
    media = ImageTokens.of_images(tokens, bounds([IMAGES[k] for k in chosen]), max(IMAGES))
    ids = torch.cat([texts[k] for k in chosen])
    text = PackedText(ids=ids, cu_seqlens=bounds([TEXTS[k] for k in chosen]), max_seqlen=max(TEXTS))
    return media, text, torch.tensor([7, 1, 2, 7])[list(chosen)]
