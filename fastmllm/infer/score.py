"""Score candidate answers by their log-probability after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmllm.infer.prompt import PackedPrompts, Starter, prefill, prompt_lengths
from fastmllm.models.continuation import Continuation
from fastmllm.models.kv_cache import KVCache
from fastmllm.models.language import LanguageModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceScore:
    """How likely one candidate is after its prompt, in nats.

    Args:
        total: sum of the log-probabilities of its tokens.
        mean: the same a token, so that long names are not punished.
        num_tokens: tokens of the candidate.
    """

    total: float
    mean: float
    num_tokens: int


@torch.no_grad()
def score_choices(
    model: Starter,
    batch: PackedPrompts,
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    rows_per_pass: int = 128,
) -> list[list[ChoiceScore]]:
    """Compute the log-probability of every candidate; each prompt and image is computed once.

    Args:
        model: `language` and `start`.
        batch: packed prompts (no answers).
        choices: token ids of each candidate of each prompt.
        rows_per_pass: candidates run together; bounds the memory of the repeated prompts.

    Returns:
        A score a candidate, in the order of `choices`.

    Raises:
        ValueError: an empty prompt or candidate, a token outside the vocabulary.
    """
    lengths = prompt_lengths(batch, "fastmllm::score_choices")
    language = model.language
    _check(choices, len(lengths), language.config.vocab_size, rows_per_pass)
    cache = language.new_cache(len(lengths), max(lengths))
    hidden, continuation = prefill(model, batch, cache)  # (S, D): predicts the first token of every candidate

    flat = [(prompt, list(tokens)) for prompt, candidates in enumerate(choices) for tokens in candidates]
    device = hidden.device
    prompts = torch.tensor([prompt for prompt, _ in flat], device=device)
    first = torch.tensor([tokens[0] for _, tokens in flat], device=device)
    totals: list[float] = _log_probabilities(language, hidden, prompts, first).tolist()
    longer = [place for place, (_, tokens) in enumerate(flat) if len(tokens) > 1]
    longer.sort(key=lambda place: len(flat[place][1]))  # similar lengths together: less padding
    for begin in range(0, len(longer), rows_per_pass):
        part = longer[begin : begin + rows_per_pass]
        rest = _score_rest(continuation, cache, [flat[place] for place in part], device)
        for place, value in zip(part, rest, strict=True):
            totals[place] += value
    scores = iter(
        ChoiceScore(total=total, mean=total / len(tokens), num_tokens=len(tokens))
        for total, (_, tokens) in zip(totals, flat, strict=True)
    )
    return [[next(scores) for _ in candidates] for candidates in choices]


def _check(choices: Sequence[Sequence[Sequence[int]]], num_prompts: int, vocab_size: int, rows: int) -> None:
    op = "fastmllm::score_choices"
    if rows < 1:
        raise ValueError(f"{op}: rows_per_pass must be positive, got {rows}")
    if len(choices) != num_prompts:
        raise ValueError(f"{op}: {len(choices)} lists of candidates for {num_prompts} prompts")
    for prompt, candidates in enumerate(choices):
        if not candidates:
            raise ValueError(f"{op}: prompt {prompt} has no candidate")
        for place, tokens in enumerate(candidates):
            if not tokens:
                raise ValueError(f"{op}: candidate {place} of prompt {prompt} is empty")
            if min(tokens) < 0 or max(tokens) >= vocab_size:
                raise ValueError(
                    f"{op}: candidate {place} of prompt {prompt} has a token outside the vocabulary of {vocab_size}"
                )


def _score_rest(
    continuation: Continuation, prefix: KVCache, candidates: Sequence[tuple[int, list[int]]], device: torch.device
) -> list[float]:
    """Sum the log-probabilities of the second and later tokens of each candidate, given the cached prompts."""
    counts = [len(tokens) - 1 for _, tokens in candidates]
    rows = [prompt for prompt, _ in candidates]
    cache = prefix.select(rows, max_length=max(prefix.lengths[row] for row in rows) + max(counts))
    inputs = torch.tensor([token for _, tokens in candidates for token in tokens[:-1]], device=device)
    targets = torch.tensor([token for _, tokens in candidates for token in tokens[1:]], device=device)
    owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)).to(device)  # (T,)
    hidden = continuation.select(rows).extend(inputs, counts, cache)
    each = _log_probabilities(continuation.language, hidden, torch.arange(len(inputs), device=device), targets)
    return each.new_zeros(len(rows)).index_add_(0, owners, each).tolist()


def _log_probabilities(
    language: LanguageModel, hidden: Tensor, rows: Tensor, targets: Tensor, chunk: int = 256
) -> Tensor:
    """Compute log p(target) from hidden rows; never more than `chunk` rows of logits at a time.

    Args:
        language: holds the head.
        hidden: (N, D).
        rows: (M,) row of `hidden` that each target follows.
        targets: (M,) token ids.
        chunk: rows of `hidden` a step.

    Returns:
        (M,) fp64, nats.
    """
    out = torch.empty(len(targets), dtype=torch.float64, device=hidden.device)
    for begin in range(0, len(hidden), chunk):
        logits = language.logits(hidden[begin : begin + chunk]).float()  # (chunk, V)
        total = logits.logsumexp(dim=-1)
        mine = ((rows >= begin) & (rows < begin + chunk)).nonzero().squeeze(1)
        local = rows[mine] - begin
        out[mine] = (logits[local, targets[mine]] - total[local]).double()
    return out
