"""Answer messages about images: all requests in one packed batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from fastmllm.data.text import end_token
from fastmllm.infer.answer import Answer
from fastmllm.infer.generation import decode
from fastmllm.infer.limits import check_context
from fastmllm.infer.messages import Message, Picture, conversation
from fastmllm.infer.prompt import prompt_lengths
from fastmllm.infer.respond import collate_for, template_of
from fastmllm.infer.sampling import SamplingParams
from fastmllm.models.mllm import MLLM
from fastmllm.models.vlm import VLM

OP = "fastmllm.infer.generate"
Params = SamplingParams | Sequence[SamplingParams]


def generate(
    model: VLM | MLLM,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    images: Sequence[Picture] | Sequence[Sequence[Picture]] = (),
    sampling: Params | None = None,
) -> list[Answer]:
    """Answer one request, or many in one packed prefill; an image that several show is encoded once.

    Args:
        model: with a tokenizer and a chat template.
        messages: of one request, or a list of them a request; `infer.messages.conversation` says what they look like.
        images: for places without one of their own: of one request, or a list a request.
        sampling: how answers are drawn, greedily by default; one for all requests, or one each. Two equal requests of
            one seed have one answer: give seeds that differ.

    Returns:
        An answer a request, in order: text, ids, log_probs, finish_reason.

    Raises:
        ValueError: a request that cannot be read or has another number of images than places; prompts that do not fit
            the context, each with the tokens that are too many.
        TextError, ImageError: what is said or shown cannot be read.
        RuntimeError: keys and values do not fit the memory.
        TypeError: another model.
    """
    batch, answers = _asked(model, messages, images, sampling)
    for _ in decode(model, batch, answers):
        pass
    return answers


def stream(
    model: VLM | MLLM,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    images: Sequence[Picture] | Sequence[Sequence[Picture]] = (),
    sampling: Params | None = None,
) -> Iterator[tuple[int, str]]:
    """Answer as `generate` does, piece by piece.

    Yields:
        Number of the request, and the next piece of its answer's text: whole characters, nothing that is taken back.
    """
    batch, answers = _asked(model, messages, images, sampling)
    for moved in decode(model, batch, answers):
        for number in moved:
            if piece := answers[number].take():
                yield number, piece


def _asked(
    model: VLM | MLLM, messages: Sequence[Any], images: Sequence[Any], sampling: Params | None
) -> tuple[Any, list[Answer]]:
    """Read and pack the requests."""
    if not isinstance(model, VLM | MLLM):
        raise TypeError(
            f"{OP}: a {type(model).__name__}; a patched model of transformers answers by its own model.generate(), an "
            "MLLM is made by fastmllm.models.talk.load_mllm"
        )
    if not messages:
        raise ValueError(f"{OP}: no messages; give at least one")
    many = not isinstance(messages[0], dict)
    requests = cast(Sequence[Sequence[Message]], messages if many else [messages])
    pictures = cast(Sequence[Sequence[Picture]], (images or [()] * len(requests)) if many else [images])
    params = [sampling or SamplingParams()] * len(requests) if not isinstance(sampling, Sequence) else list(sampling)
    if len(pictures) != len(requests) or len(params) != len(requests):
        raise ValueError(f"{OP}: {len(requests)} requests, {len(pictures)} lists of images, {len(params)} sampling")
    template = template_of(model)
    assert model.tokenizer is not None
    with TemporaryDirectory(prefix="fastmllm-") as made:
        talks = []
        for number, (request, shown) in enumerate(zip(requests, pictures, strict=True)):
            folder = Path(made) / str(number)
            folder.mkdir()
            talks.append(conversation(request, shown, f"request {number}", folder))
        batch = collate_for(model, talks, with_answers=False)
    new = [p.max_new_tokens for p in params]
    check_context(model.language, prompt_lengths(batch, OP), new, OP)
    stop = (end_token(model.tokenizer, template),)
    answers = [Answer(p, stop, model.tokenizer, template.answer_lead) for p in params]
    # the same name for all: a request draws by its seed, wherever it stands
    return replace(batch, ids=["request"] * len(requests)), answers
