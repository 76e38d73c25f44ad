"""Samples and conversations as the packed batches of a multimodal model of any composition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from fastmllm.data.images import ImageError, open_image, upright_size
from fastmllm.data.packer import Size
from fastmllm.data.sample import Conversation, Sample
from fastmllm.data.text import ChatTemplate, encode
from fastmllm.data.turns import Piece, images_of, pieces_of
from fastmllm.models.inputs import IGNORE, Inputs
from fastmllm.models.mllm import MLLM
from fastmllm.models.tower import Known, known_from


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelled:
    """A sample in tokens, with its pictures open.

    Args:
        id: of the sample.
        tokens: token ids; None = the next picture.
        labels: aligned with them; -100 where nothing is scored.
        paths, pictures: in their order; `Known` where the model's feature store has a picture's features.
    """

    id: str
    tokens: list[int | None]
    labels: list[int]
    paths: list[str]
    pictures: list[Image.Image | Known]


def spell(
    sample: Sample | Conversation, model: MLLM, template: ChatTemplate, *, with_answers: bool = True,
    answer: Sequence[int] | None = None,
) -> Spelled:  # fmt: skip
    """Tokenise a sample and open its pictures.

    Args:
        sample: a question, or a conversation with any number of pictures.
        model: with a tokenizer and a configuration.
        template: text around prompts and answers.
        with_answers: False ends it at its last prompt, for generation; nothing is scored then.
        answer: tokens that stand, and are scored, in place of the last answer and its end token.

    Raises:
        TextError: a text that cannot be tokenised.
        ImageError: an image that cannot be read.
    """
    pieces, around = _words(sample, model, template, with_answers and answer is None)
    if with_answers and answer is not None:
        pieces.append(Piece(list(answer), answer=True))
    tokens: list[int | None] = []
    labels: list[int] = []
    for piece in pieces:
        ids = [*around[0], None, *around[1]] if piece is None else piece.ids
        scored = piece is not None and piece.answer and with_answers
        labels += [token if scored and token is not None else IGNORE for token in ids]
        tokens += ids
    paths = images_of(sample)
    pictures = [picture_of(model, path) for path in paths]
    return Spelled(id=sample.id, tokens=tokens, labels=labels, paths=paths, pictures=pictures)


def _words(
    sample: Sample | Conversation, model: MLLM, template: ChatTemplate, with_answers: bool
) -> tuple[list[Piece | None], list[list[int]]]:
    """Return the pieces of a sample, None for a picture, and the tokens in front of and behind each picture."""
    config, tokenizer = model.config, model.tokenizer
    if config is None or tokenizer is None:
        raise ValueError("MLLM: words need a tokenizer and a configuration: make the model with load_mllm")
    around = [encode(tokenizer, text) if text else [] for text in (config.image_lead, config.image_end)]
    size = model.language.config.vocab_size
    return list(pieces_of(sample, tokenizer, template, vocab_size=size, with_answers=with_answers)), around


def spelled_size(
    sample: Sample | Conversation, model: MLLM, template: ChatTemplate, *, with_answers: bool = True
) -> Size:
    """Return what a sample takes of a budget, its visual tokens among `text`: of pictures, headers are read.

    Raises:
        TextError, ImageError: as `spell`, as far as headers tell.
    """
    pieces, around = _words(sample, model, template, with_answers)
    paths = images_of(sample)
    text = sum(len(piece.ids) for piece in pieces if piece is not None) + len(paths) * sum(map(len, around))
    for path in paths:
        try:
            text += model.rows_of_picture(*upright_size(path))
        except ImageError:
            raise
        except ValueError as error:
            raise ImageError(f"{path}: {error}") from error
    return Size(text=text, images=len(paths))


def picture_of(model: MLLM, path: str) -> Image.Image | Known:
    """Open a picture, or look up its features in the model's store.

    Raises:
        ImageError: it cannot be read, or the model's resolution policy refuses it.
    """
    try:
        entry = None if model.feature_store is None else model.feature_store.entry(path)
    except OSError:
        entry = None  # opening it says why
    if entry is not None:
        return known_from(entry)
    picture = open_image(path)
    if model.packing is not None:
        try:
            model.packing.policy.plan(*picture.size)
        except ValueError as error:
            raise ImageError(f"{path}: {error}") from error
    return picture


def pack_spelled(model: MLLM, rows: Sequence[Spelled], *, scored: bool = True) -> Inputs:
    """Pack samples; a picture that several of them show is in the batch, and encoded, once.

    Args:
        model: with a resolution policy.
        rows: at least one.
        scored: False learns nothing from them, which keeps a rank computing along.

    Raises:
        ValueError: no rows, or a picture that the policy refuses.
    """
    if not rows:
        raise ValueError("collate: no samples; give at least one")
    assert model.config is not None
    first: dict[str, Image.Image | Known] = {}
    samples = []
    for row in rows:
        shown = iter([first.setdefault(path, picture) for path, picture in zip(row.paths, row.pictures, strict=True)])
        samples.append([next(shown) if token is None else token for token in row.tokens])
    labels = [row.labels if scored else [IGNORE] * len(row.labels) for row in rows]
    paths = () if model.feature_store is None else tuple(first)
    return replace(model.pack(samples, labels, model.config.sees, paths), ids=[row.id for row in rows])


def collate_pictures(
    model: MLLM, samples: Sequence[Sample | Conversation], template: ChatTemplate, *, with_answers: bool,
    answers: Sequence[Sequence[int]] | None = None,
) -> Inputs:  # fmt: skip
    """Pack samples the way a model reads them; arguments as `spell`, `answers` one of each sample."""
    given = [None] * len(samples) if answers is None else answers
    rows = [
        spell(sample, model, template, with_answers=with_answers, answer=answer)
        for sample, answer in zip(samples, given, strict=True)
    ]
    return pack_spelled(model, rows)
