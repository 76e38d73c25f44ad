"""One sample ready to be packed: tokens, labels, places of images, pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fastmllm.data.images import load_image
from fastmllm.data.packer import Size
from fastmllm.data.sample import Conversation, Sample
from fastmllm.data.text import CHAT, ChatTemplate
from fastmllm.data.turns import Piece, images_of, pieces_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORE = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A sample, ready to be packed.

    Args:
        id: of the sample.
        input_ids: L tokens; image positions hold the image token's id.
        labels: L, already shifted.
        image_index: positions that take visual tokens, from the row's start.
        images: paths.
        pixels: (H, W, 3) uint8 of each image, or its features, (N, Dv), from a store; None where features are cached.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    image_index: list[int]
    images: list[str]
    pixels: list[torch.Tensor] | None


def prepare(
    sample: Sample | Conversation,
    tokenizer: Tokenizer,
    *,
    num_visual_tokens: int,
    image_size: int,
    image_token_id: int,
    template: ChatTemplate = CHAT,
    load_pixels: bool = True,
    with_answers: bool = True,
    answer: Sequence[int] | None = None,
    vocab_size: int | None = None,
    load: Callable[[str, int], torch.Tensor] = load_image,
) -> Row:
    """Tokenise a sample and load its images; arguments and errors as `collate`.

    `load` reads an image, (path, size) -> (H, W, 3) uint8; one that remembers reads what several samples show once.
    """
    if num_visual_tokens < 1:
        raise ValueError(f"collate: num_visual_tokens must be at least 1, got {num_visual_tokens}")
    input_ids: list[int] = []
    scored: list[bool] = []
    image_index: list[int] = []
    own = with_answers and answer is None
    pieces = list(pieces_of(sample, tokenizer, template, vocab_size=vocab_size, with_answers=own))
    if with_answers and answer is not None:
        pieces.append(Piece(list(answer), answer=True))
    for piece in pieces:
        if piece is None:
            image_index += range(len(input_ids), len(input_ids) + num_visual_tokens)
            piece = Piece([image_token_id] * num_visual_tokens)
        input_ids += piece.ids
        scored += [piece.answer and with_answers] * len(piece.ids)
    # What stands before an answer's token predicts it; the last position predicts nothing.
    labels = [token if answer else IGNORE for token, answer in zip(input_ids[1:], scored[1:], strict=True)]
    images = images_of(sample)
    return Row(
        id=sample.id,
        input_ids=input_ids,
        labels=[*labels, IGNORE],
        image_index=image_index,
        images=images,
        pixels=[load(path, image_size) for path in images] if load_pixels else None,
    )


def size_of(
    sample: Sample | Conversation, tokenizer: Tokenizer, template: ChatTemplate = CHAT, *, vocab_size: int | None = None
) -> Size:
    """Return what a sample takes of a budget; nothing of its images is read.

    Raises:
        TextError: as `tokenise`.
    """
    pieces = pieces_of(sample, tokenizer, template, vocab_size=vocab_size)
    return Size(sum(len(piece.ids) for piece in pieces if piece is not None), pieces.count(None))


def unscored(row: Row) -> Row:
    """Return a row from which nothing is learned, which keeps a rank computing along."""
    return replace(row, labels=[IGNORE] * len(row.labels))
