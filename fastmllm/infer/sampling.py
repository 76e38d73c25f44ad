"""Choose the next token of each sequence from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Say how an answer is drawn and where it ends; names as in vLLM and transformers, filters in transformers' order.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: keep that many of the most likely tokens; 0 keeps all.
        top_p: of those, keep the most likely ones up to this total probability (arXiv 1904.09751).
        min_p: of those, keep what is at least this times as likely as the most likely one (arXiv 2407.01082).
        repetition_penalty: divides positive, multiplies negative logits of what prompt and answer hold (1909.05858).
        max_new_tokens: most tokens of an answer.
        stop: texts that end an answer, also across tokens; not part of its text.
        stop_token_ids: tokens that end an answer, not part of it, besides the end of the chat template.
        seed: start of the random stream; every request has its own, whatever else is in the batch.
        logprobs: keep the log-probability of each chosen token, before temperature, penalty and filters.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name, fits, range_ in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of texts, none of them empty"),
        ):
            if not fits:
                raise ValueError(f"fastmllm::SamplingParams: {name} must be {range_}, got {getattr(self, name)!r}")


def sequence_generators(seeds: Sequence[int], names: Sequence[str]) -> list[torch.Generator]:
    """Make one random stream a sequence, seeded by its name and not by its place in the batch.

    Args:
        seeds: of each sequence.
        names: of each sequence.

    Returns:
        One generator on the host a sequence.
    """
    # the host generator reads 32 bits of its seed: mix both parts into them
    pairs = zip(seeds, names, strict=True)
    return [torch.Generator().manual_seed(crc32(f"{seed} {name}".encode())) for seed, name in pairs]


class Sampler:
    """Choose one token a sequence and step.

    Args:
        params: of each sequence.
        names: of each sequence, for its random stream.
        prompts: token ids of each prompt; read only where there is a repetition penalty.
        device: of the logits.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        names: Sequence[str],
        prompts: Sequence[Sequence[int]] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        if len(names) != len(params):
            raise ValueError(f"fastmllm::Sampler: {len(names)} names for {len(params)} sequences")
        self.params = list(params)
        self.generators = sequence_generators([p.seed for p in params], names)
        self.device = device
        self._prompts = [list(ids) for ids in prompts]
        self._seen: Tensor | None = None  # (B, V) bool
        self._read()

    def _read(self) -> None:
        """Put the numbers of the present sequences on the device, once."""

        def column(name: str) -> Tensor:
            return torch.tensor([getattr(p, name) for p in self.params], device=self.device)[:, None]

        self.greedy = all(p.temperature == 0 for p in self.params)
        self.penalised = any(p.repetition_penalty != 1 for p in self.params)
        self.logprobs = any(p.logprobs for p in self.params)
        self._temperature, self._penalty = column("temperature").float(), column("repetition_penalty").float()
        self._top_k, self._top_p, self._min_p = column("top_k"), column("top_p").float(), column("min_p").float()

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the sequences, in this order."""
        self.params = [self.params[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        self._prompts = [self._prompts[row] for row in rows] if self._prompts else []
        if self._seen is not None:
            self._seen = self._seen[torch.tensor(list(rows), device=self._seen.device)]
        self._read()

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose.

        Args:
            logits: (B, V), any float dtype.

        Returns:
            Tokens (B,) int64, and their log-probabilities (B,) fp32 where a sequence asks for them.
        """
        logits = logits.float()
        scores = self._penalise(logits) if self.penalised else logits
        tokens = scores.argmax(dim=-1)
        if not self.greedy:
            tokens = torch.where(self._temperature[:, 0] == 0, tokens, self._draw(scores))
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        if not self.logprobs:
            return tokens, None
        return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=-1)

    def _penalise(self, logits: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, ids in enumerate(self._prompts):
                known = torch.tensor(ids, dtype=torch.int64, device=logits.device)
                self._seen[row, known[known < logits.shape[1]]] = True  # a placeholder may have no row in the head
        punished = torch.where(logits > 0, logits / self._penalty, logits * self._penalty)
        return torch.where(self._seen, punished, logits)

    def _draw(self, scores: Tensor) -> Tensor:
        """Draw (B,) from what the filters keep, by the inverse of the distribution."""
        warm = torch.where(self._temperature == 0, 1.0, self._temperature)
        likely, order = (scores / warm).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        kept = (self._top_k == 0) | (torch.arange(likely.shape[1], device=likely.device) < self._top_k)
        likely = likely * kept
        likely = likely / likely.sum(dim=-1, keepdim=True)
        total = likely.cumsum(dim=-1)
        kept &= total - likely < self._top_p  # the token that crosses top_p stays in
        kept &= likely >= self._min_p * likely[:, :1]
        total = total.masked_fill(~kept, 0).amax(dim=-1, keepdim=True).minimum(total)  # cumulative over the kept
        draws = [
            torch.rand((), generator=generator) if p.temperature else torch.zeros(())
            for p, generator in zip(self.params, self.generators, strict=True)
        ]
        places = torch.searchsorted(total, torch.stack(draws).to(total.device)[:, None] * total[:, -1:], right=True)
        return order.gather(1, places.minimum(kept.sum(dim=-1, keepdim=True) - 1)).squeeze(1)
