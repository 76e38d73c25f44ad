"""Tiny models of transformers with random weights, and batches that a drop-in has to get right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

VOCAB, IMAGE, VIDEO, BOS, EOS, PAD = 128, 5, 6, 1, 2, 0
IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7, "hidden_act": "quick_gelu", "projection_dim": 32,
}  # fmt: skip  # 16 patches and CLS
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip  # 16 patches
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, **IDS,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of model.

    Args:
        name: transformers' folder.
        build: makes a model, fp32, eval, the same weights every time (`finish`).
        batch: makes a training batch with `labels`: several images a row, of several sizes where the family has them,
            rows of several lengths (padded), ignored labels. A tower's batch has no labels.
        prompt: makes a batch for `generate`, or None: a tower.
        without_gradient: parts of names of parameters whose gradient is zero in exact arithmetic.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    prompt: Callable[[], dict[str, Any]] | None = None
    ops: frozenset[str] = frozenset()  # that its report must show as replaced, all ops asked for

    def __repr__(self) -> str:  # pytest's name of the case
        return self.name


def finish(model: nn.Module, seed: int = 0) -> Any:
    """Draw every parameter anew: a gate, bias or position table of zeros would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=generator)
            if p.ndim <= 1 and name.endswith("weight"):  # norms
                p.copy_(1 + 0.1 * x)
            elif p.ndim <= 1 or ("gate" in name and p.numel() == 1) or "alpha" in name:
                p.copy_(0.3 * x)
            else:
                p.copy_(0.5 * x / p.shape[-1] ** 0.5)
    model.tie_weights()
    return model.eval().requires_grad_(True)


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(*texts: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    """Pad token lists to one length: input_ids, attention_mask."""
    longest = max(map(len, texts))
    gaps = [[PAD] * (longest - len(t)) for t in texts]
    padded = [t + g if side == "right" else g + t for t, g in zip(texts, gaps, strict=True)]
    seen = [[1] * len(t) + [0] * len(g) if side == "right" else [0] * len(g) + [1] * len(t)
            for t, g in zip(texts, gaps, strict=True)]  # fmt: skip
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(seen)}


def text(*parts: int | list[int]) -> list[int]:
    """Write a row: BOS, then lists of token ids as they are, and an image as its number of placeholders."""
    row = [BOS]
    for part in parts:
        row += [IMAGE] * part if isinstance(part, int) else part
    return row


def labelled(batch: dict[str, Any], scored: int = 4) -> dict[str, Any]:
    """Add labels: the last tokens of each row, the rest ignored."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, seen in zip(labels, batch["attention_mask"], strict=True):
        last = int(seen.nonzero().max()) + 1
        row[: last - scored] = -100
    return {**batch, "labels": labels}
