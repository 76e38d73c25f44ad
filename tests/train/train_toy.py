"""A toy multimodal model and its batches, for the tests of the train room and their ranks."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig
from fastmllm.train.trainer import Trainer

RULES = {"connector.*": 1e-2, "language.blocks.1.*": 1e-3}


@dataclass
class ToyBatch:
    input_ids: Tensor  # (T,)
    labels: Tensor  # (T,)
    num_targets: int
    ids: list[str]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.down(F.gelu(self.up(self.norm(x))))


class Language(nn.Module):
    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, vocabulary, bias=False)


class Toy(nn.Module):
    """The loss sum over a batch's targets; dropout in the connector, so that random state matters."""

    def __init__(self, width: int = 16, vocabulary: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.language = Language(width, vocabulary)
        self.connector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width))

    def forward(self, batch: ToyBatch) -> Tensor:
        x = self.language.embed(batch.input_ids)  # (T, D)
        x = x + self.connector(x.to(self.connector[0].weight.dtype)).to(x.dtype)
        for block in self.language.blocks:
            x = block(x)
        logits = self.language.head(x).float()
        return F.cross_entropy(logits, batch.labels, ignore_index=-100, reduction="sum")


def toy(seed: int = 0, **options: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**options)


def sample(index: int, vocabulary: int = 64) -> ToyBatch:
    """One packed batch; its length and its number of targets depend on the index."""
    draw = torch.Generator().manual_seed(index)
    length = 6 + 3 * (index % 3)
    ids = torch.randint(0, vocabulary, (length,), generator=draw)
    labels = (3 * ids + 1) % vocabulary
    labels[: 1 + index % 4] = -100
    return ToyBatch(ids, labels, int((labels != -100).sum()), [f"sample-{index}"])


def joined(*batches: ToyBatch) -> ToyBatch:
    return ToyBatch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        sum(batch.num_targets for batch in batches),
        [name for batch in batches for name in batch.ids],
    )


def stage(**changes: Any) -> StageConfig:
    values: dict[str, Any] = {
        "name": "toy", "steps": 6, "trainable": RULES, "warmup": 1, "weight_decay": 0.1, "clip": 0.55, "seed": 3,
    }  # fmt: skip
    return StageConfig(**(values | changes))


def trainer(
    out: Path,
    model: nn.Module,
    *,
    changes: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    batches: Callable[[int], Any] = sample,
    console: Console | None = None,
    **options: Any,
) -> Trainer:
    console = console or Console(file=io.StringIO(), width=200)
    return Trainer(
        model, stage(**(changes or {})), EngineConfig(**(engine or {})), batches, out, console=console, **options
    )


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}
