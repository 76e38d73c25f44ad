"""What a call says about its text: where its images are, and where its questions end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fastmllm.compression.reduction import IGNORED
from fastmllm.compression.tokens import Grid


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a call says about its text.

    Args:
        ids: (B, T) of the text that is new.
        token: the id of a placeholder.
        seqlens: placeholders of each image.
        grid: of each image, if it is one.
        mask: (B, P + T) on the host, 0 where the text is padded, or None.
        labels: (B, T) on the host, already shifted, or None.
        asked: columns up to where the question ends, where an answer follows it already; None: all of them.
        left: rows of different lengths are padded in front.
    """

    ids: Tensor
    token: int
    seqlens: tuple[int, ...]
    grid: tuple[Grid, ...] | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None
    asked: int | None = None
    left: bool = False

    def answers(self, valid: Tensor) -> Tensor | None:
        """Return labels (T',) of the tokens that a mask (B, T) names, that say which rows are answers, or None."""
        labels = self.labels
        if labels is None and self.asked is not None and self.asked < valid.shape[1]:
            labels = torch.zeros(valid.shape, dtype=torch.int64)
            labels[:, : self.asked - 1] = IGNORED
        return None if labels is None else labels[valid]


def image_lengths(features: Any, places: Tensor) -> tuple[int, ...]:
    """Return the placeholders of each image, as they were encoded; where that does not say, of each run of them."""
    runs = [len(list(run)) for row in places.tolist() for there, run in groupby(row) if there]
    x = features.pooler_output
    entries = list(x) if not isinstance(x, Tensor) or x.dim() == 3 else []
    lengths = [n for e in entries for n in ([e.shape[1]] * len(e) if e.dim() == 3 else [len(e)])]
    ends = set(torch.tensor(lengths).cumsum(0).tolist())
    if set(torch.tensor(runs).cumsum(0).tolist()) <= ends and sum(lengths) == sum(runs):
        return tuple(lengths)
    return tuple(runs)


def images_of_rows(seqlens: Sequence[int], places: Tensor) -> list[int]:
    """Return how many images each row has."""
    ends = torch.tensor(seqlens).cumsum(0)
    return torch.bincount(torch.bucketize(ends, places.sum(1).cumsum(0)), minlength=len(places)).tolist()
