"""Choose the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Say how the next token is drawn.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_p: keep the most likely tokens up to this total probability (arXiv 1904.09751).
        seed: start of the random stream; every sequence has its own, so a batch draws what a single prompt draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"fastmllm::Sampling: temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"fastmllm::Sampling: top_p must be in (0, 1], got {self.top_p}")


def sequence_generators(sampling: Sampling, ids: Sequence[str]) -> list[torch.Generator]:
    """Make one random stream a sequence, seeded by its id and not by its place in the batch.

    Args:
        sampling: holds the seed.
        ids: name of each sequence.

    Returns:
        One generator on the host a sequence.
    """
    # the host generator reads 32 bits of its seed: mix both parts into them
    return [torch.Generator().manual_seed(crc32(f"{sampling.seed} {name}".encode())) for name in ids]


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator] = ()) -> Tensor:
    """Choose one token a sequence.

    Args:
        logits: (B, V), any float dtype.
        sampling: how.
        generators: one a sequence; read only when the temperature is above 0.

    Returns:
        (B,) int64.

    Raises:
        ValueError: fewer generators than sequences.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    if len(generators) != len(logits):
        raise ValueError(f"fastmllm::choose: {len(generators)} generators for {len(logits)} sequences")
    probabilities, order = (logits / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    total = probabilities.cumsum(dim=-1)
    kept = total - probabilities < sampling.top_p  # the token that crosses top_p stays in
    total = total.masked_fill(~kept, 0).amax(dim=-1, keepdim=True).minimum(total)  # (B, V) cumulative over the kept
    draws = torch.stack([torch.rand((), generator=generator) for generator in generators]).to(total.device)
    places = torch.searchsorted(total, (draws[:, None] * total[:, -1:]), right=True)  # inverse of the distribution
    places = places.minimum(kept.sum(dim=-1, keepdim=True) - 1)
    return order.gather(1, places).squeeze(1)
