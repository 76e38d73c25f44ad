"""Generate answers for a packed batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastmllm.infer.prompt import PackedPrompts, Starter, prefill, prompt_lengths
from fastmllm.infer.sampling import Sampling, choose, sequence_generators

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def stop_ids(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[int, ...]:
    """Look up the tokens that end an answer.

    Args:
        tokenizer: of the language model.
        names: tokens such as "<|im_end|>".

    Returns:
        Their ids.

    Raises:
        ValueError: a name that is not one token of the vocabulary.
    """
    found: list[int] = []
    for name in names:
        index = tokenizer.token_to_id(name)
        if index is None:
            raise ValueError(f"fastmllm::stop_ids: {name!r} is not a token of this vocabulary")
        found.append(index)
    return tuple(found)


@torch.no_grad()
def generate(
    model: Starter,
    batch: PackedPrompts,
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """Continue every prompt of a batch.

    Args:
        model: `language` and `start`.
        batch: packed prompts (no answers).
        max_new_tokens: most tokens a sequence.
        stop: ids that end a sequence; not part of the result.
        sampling: greedy if None.

    Returns:
        The new token ids of each prompt, in order.

    Raises:
        ValueError: an empty prompt, a stop id outside the vocabulary.
    """
    op = "fastmllm::generate"
    lengths = prompt_lengths(batch, op)
    language = model.language
    vocab_size = language.config.vocab_size
    if max_new_tokens < 1:
        raise ValueError(f"{op}: max_new_tokens must be positive, got {max_new_tokens}")
    for token in stop:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{op}: stop token {token} is outside the vocabulary of {vocab_size}")
    sampling = sampling or Sampling()
    generators = []
    if sampling.temperature > 0:
        generators = sequence_generators(sampling, batch.ids)
    cache = language.new_cache(len(lengths), max(lengths) + max_new_tokens - 1)
    hidden, continuation = prefill(model, batch, cache)  # (B, D)

    answers: list[list[int]] = [[] for _ in lengths]
    active = list(range(len(lengths)))  # sequence of each row of the cache
    ended: set[int] = set()
    while True:
        tokens = choose(language.logits(hidden), sampling, [generators[row] for row in active] if generators else ())
        for row, token in zip(active, tokens.tolist(), strict=True):
            if row in ended:
                continue
            if token in stop:
                ended.add(row)
            else:
                answers[row].append(token)
                if len(answers[row]) == max_new_tokens:
                    ended.add(row)
        if len(ended) == len(lengths):
            return answers
        running = [place for place, row in enumerate(active) if row not in ended]
        if 2 * len(running) <= len(active):  # half is done: stop computing it (the copy costs one cache pass)
            cache, continuation = cache.select(running), continuation.select(running)
            tokens, active = tokens[running], [active[place] for place in running]
        hidden = continuation.extend(tokens, [1] * len(active), cache)
