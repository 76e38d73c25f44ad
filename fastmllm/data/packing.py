"""Packed batches: samples one after the other, without padding, with cumulative lengths."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from fastmllm.data.images import load_image
from fastmllm.data.rows import IGNORE, Row, prepare
from fastmllm.data.sample import Conversation, Sample
from fastmllm.data.text import CHAT, ChatTemplate, Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(slots=True)
class Batch:
    """S samples with I images in T tokens; image positions hold the image token's id.

    Args:
        input_ids: (T,) int64.
        labels: (T,) int64, already shifted: labels[t] is what position t must predict; -100 = not scored.
        position_ids: (T,) int64, restarting in each sample.
        cu_seqlens: (S + 1,) int32.
        max_seqlen: longest sample, a host number.
        image_index: (P * K,) int64, positions that take visual tokens, place by place, row-major.
        pixels: (I, H, W, 3) uint8; None where features are cached, or without images. With `features`, those of the
            other images, in order.
        num_targets: scored positions, a host number.
        ids: S sample ids.
        image_paths: I paths, each once.
        shown: (P,) int64, the image of each place, where several samples show one; None: P = I, each has its own.
        features: image -> its features, (N, Dv), of those that were found in a store; None: there is no store.
        budget: positions that it could have had, where it was filled to a budget; 0 = it has a number of samples.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    image_index: torch.Tensor
    pixels: torch.Tensor | None
    num_targets: int
    ids: list[str]
    image_paths: list[str]
    shown: torch.Tensor | None = None
    budget: int = 0
    features: dict[int, torch.Tensor] | None = None

    @property
    def num_visual_tokens(self) -> int:
        """Positions that take visual tokens."""
        return self.image_index.numel()


def sequence_length(tokens: Tokens, num_visual_tokens: int, with_answer: bool = True) -> int:
    """Return the length of a sample in a batch."""
    answer = len(tokens.answer) if with_answer else 0
    return len(tokens.prefix) + num_visual_tokens + len(tokens.prompt) + answer


def join(rows: Sequence[Row], budget: int = 0) -> Batch:
    """Pack rows one after the other, all of them with pixels or none; an image that several show is there once.

    Args:
        rows: of the samples.
        budget: `Batch.budget`.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("collate: no samples; give at least one")
    bounds = [0, *accumulate(len(row.input_ids) for row in rows)]
    labels = [label for row in rows for label in row.labels]
    places: dict[str, int] = {}  # image -> its number
    shown = [places.setdefault(path, len(places)) for row in rows for path in row.images]
    each = [image for row in rows for image in row.pixels or ()]
    loaded = [each[shown.index(number)] for number in range(len(places))] if each else []
    pixels = [image for image in loaded if not image.is_floating_point()]
    features = {number: image for number, image in enumerate(loaded) if image.is_floating_point()}
    return Batch(
        input_ids=torch.tensor([token for row in rows for token in row.input_ids], dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        position_ids=torch.tensor([t for row in rows for t in range(len(row.input_ids))], dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(end - start for start, end in pairwise(bounds)),
        image_index=torch.tensor(
            [start + at for start, row in zip(bounds, rows, strict=False) for at in row.image_index], dtype=torch.int64
        ),
        pixels=torch.stack(pixels) if pixels else None,  # (I, H, W, 3)
        num_targets=sum(label != IGNORE for label in labels),
        ids=[row.id for row in rows],
        image_paths=list(places),
        shown=torch.tensor(shown, dtype=torch.int64) if len(shown) > len(places) else None,
        budget=budget,
        features=features or None,
    )


def collate(
    samples: Sequence[Sample | Conversation],
    tokenizer: Tokenizer,
    *,
    num_visual_tokens: int,
    image_size: int,
    image_token_id: int,
    template: ChatTemplate = CHAT,
    load_pixels: bool = True,
    with_answers: bool = True,
    answers: Sequence[Sequence[int]] | None = None,
    vocab_size: int | None = None,
) -> Batch:
    """Pack samples: [prefix] [K image tokens] [prompt] [answer] [end], and so on for each turn of a conversation.

    An image's tokens are always there in full; a sample without an image has none. An image that several samples show
    is read, is in the batch, and is encoded, once.

    Args:
        samples: at least one.
        tokenizer: of the language model.
        num_visual_tokens: K, for each image.
        image_size: side in pixels that images are resized to.
        image_token_id: placeholder in `input_ids`; its embedding is replaced.
        template: text around prompt and answer.
        load_pixels: False leaves `pixels` None, for features cached by `image_paths`.
        with_answers: False ends each sample at its last prompt, for generation; nothing is scored then.
        answers: tokens that stand, and are scored, in place of each sample's last answer and its end token.
        vocab_size: as `tokenise`.

    Raises:
        ValueError: no samples, or K < 1.
        TextError: a prompt or an answer that cannot be tokenised.
        ImageError: an image that cannot be read.
    """
    once = cache(load_image)
    rows = [
        prepare(
            sample,
            tokenizer,
            num_visual_tokens=num_visual_tokens,
            image_size=image_size,
            image_token_id=image_token_id,
            template=template,
            load_pixels=load_pixels,
            with_answers=with_answers,
            answer=None if answers is None else answers[number],
            vocab_size=vocab_size,
            load=once,
        )
        for number, sample in enumerate(samples)
    ]
    return join(rows)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over bins of `capacity`: first fit, longest first, equal lengths in their order.

    Args:
        lengths: tokens of each item, at least 1.
        capacity: tokens of a bin.

    Returns:
        Ascending indices of each bin; bins in the order they were opened.

    Raises:
        ValueError: an item below 1 or above the capacity (image tokens are never cut).
    """
    for i, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"pack: item {i} has {length} tokens, a bin holds 1 to {capacity}; raise the token budget or shorten it"
            )
    try:
        planner = importlib.import_module("fastmllm._planner")
    except ImportError:  # installed without the native extension
        return pack_reference(lengths, capacity)
    return [list(bin_) for bin_ in planner.pack_first_fit(list(lengths), capacity)]


def pack_reference(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Do what the native `pack_first_fit` does, in Python."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda item: -lengths[item]):  # sorted is stable
        for b, free in enumerate(room):
            if lengths[i] <= free:
                bins[b].append(i)
                room[b] -= lengths[i]
                break
        else:
            bins.append([i])
            room.append(capacity - lengths[i])
    return [sorted(bin_) for bin_ in bins]
