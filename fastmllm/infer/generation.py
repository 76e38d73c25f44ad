"""Generate answers for a packed batch of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from fastmllm.infer.answer import Answer
from fastmllm.infer.limits import check_memory
from fastmllm.infer.prompt import PackedPrompts, Starter, prefill, prompt_ids, prompt_lengths
from fastmllm.infer.sampling import Sampler, SamplingParams

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
def decode(model: Starter, batch: PackedPrompts, answers: Sequence[Answer]) -> Iterator[list[int]]:
    """Continue every prompt of a batch, a token at a time.

    Args:
        model: `language` and `start`.
        batch: packed prompts (no answers); `ids` name the random streams.
        answers: one a prompt, empty; they take the tokens, and say how each is drawn.

    Yields:
        After each step, the prompts whose answers took a token or ended.

    Raises:
        ValueError: an empty prompt, a stop id outside the vocabulary, another number of answers.
        RuntimeError: keys and values would not fit.
    """
    op = "fastmllm::generate"
    lengths = prompt_lengths(batch, op)
    language = model.language
    vocab_size = language.config.vocab_size
    if len(answers) != len(lengths):
        raise ValueError(f"{op}: {len(answers)} answers for {len(lengths)} prompts")
    for answer in answers:
        for token in answer.stop:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{op}: stop token {token} is outside the vocabulary of {vocab_size}")
    room = max(n + a.params.max_new_tokens for n, a in zip(lengths, answers, strict=True)) - 1
    check_memory(language, lengths, room, op)
    cache = language.new_cache(len(lengths), room)
    hidden, continuation = prefill(model, batch, cache)  # (B, D)
    params = [answer.params for answer in answers]
    prompts = prompt_ids(batch) if any(p.repetition_penalty != 1 for p in params) else ()
    sampler = Sampler(params, batch.ids or [""] * len(lengths), prompts, hidden.device)

    active = list(range(len(lengths)))  # sequence of each row of the cache
    while True:
        tokens, log_probs = sampler(language.logits(hidden))
        values = [None] * len(active) if log_probs is None else log_probs.tolist()
        moved = [row for row in active if answers[row].finish_reason is None]
        for row, token, value in zip(active, tokens.tolist(), values, strict=True):
            answers[row].push(token, value)
        yield moved
        running = [place for place, row in enumerate(active) if answers[row].finish_reason is None]
        if not running:
            return
        # half is done, or what ended early would outgrow the cache: stop computing it (the copy costs a cache pass)
        if 2 * len(running) <= len(active) or max(cache.lengths) == room:
            cache, continuation = cache.select(running), continuation.select(running)
            sampler.select(running)
            tokens, active = tokens[running], [active[place] for place in running]
        hidden = continuation.extend(tokens, [1] * len(active), cache)


def generate_tokens(
    model: Starter, batch: PackedPrompts, params: SamplingParams, stop: Sequence[int] = ()
) -> list[list[int]]:
    """Continue every prompt of a batch; arguments and errors as `decode`.

    Args:
        model: `language` and `start`.
        batch: packed prompts (no answers).
        params: how and how far.
        stop: further ids that end a sequence.

    Returns:
        The new token ids of each prompt, in order, without the one that ended it.
    """
    answers = [Answer(params, stop) for _ in prompt_lengths(batch, "fastmllm::generate")]
    for _ in decode(model, batch, answers):
        pass
    return [answer.ids for answer in answers]
