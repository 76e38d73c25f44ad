"""A question or a conversation in tokens, piece by piece: text, images, and the answers that are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmllm.data.conversation import PLACEHOLDER
from fastmllm.data.sample import Conversation, Sample
from fastmllm.data.text import CHAT, ChatTemplate, TextError, answer_ids, check_text, encode, end_token, tokenise

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that stand together.

    Args:
        ids: token ids.
        answer: whether they are an answer, with the token that ends it.
    """

    ids: list[int]
    answer: bool = False


def images_of(sample: Sample | Conversation) -> list[str]:
    """List the images of a sample in their order."""
    if isinstance(sample, Conversation):
        return list(sample.images)
    return [] if sample.image is None else [sample.image]


def pieces_of(
    sample: Sample | Conversation,
    tokenizer: Tokenizer,
    template: ChatTemplate = CHAT,
    *,
    vocab_size: int | None = None,
    with_answers: bool = True,
) -> list[Piece | None]:
    """Turn a sample into tokens and images.

    A conversation whose one prompt starts with its one `<image>` is spelled like the `Sample` of that image and prompt.

    Args:
        sample: what to spell.
        tokenizer: of the language model.
        template: text around prompts and answers.
        vocab_size: as `tokenise`.
        with_answers: False leaves the last answer out.

    Returns:
        Pieces in their order; None = an image.

    Raises:
        TextError: as `tokenise`, or another number of images than of placeholders.
    """
    if isinstance(sample, Sample):
        tokens = tokenise(sample, tokenizer, template, vocab_size=vocab_size)
        image = [] if sample.image is None else [None]
        pieces = [Piece(tokens.prefix), *image, Piece(tokens.prompt), Piece(tokens.answer, answer=True)]
    else:
        pieces = _conversation(sample, tokenizer, template, vocab_size)
    return pieces if with_answers else pieces[:-1]


def _conversation(
    sample: Conversation, tokenizer: Tokenizer, template: ChatTemplate, vocab_size: int | None
) -> list[Piece | None]:
    end = end_token(tokenizer, template)
    pieces: list[Piece | None] = []
    if sample.system:
        check_text(sample.id, "system", sample.system, tokenizer, vocab_size)
        pieces.append(Piece(encode(tokenizer, template.system.replace("{}", sample.system))))
    for number, turn in enumerate(sample.turns):
        words = turn.prompt.split(PLACEHOLDER)
        if not "".join(words).strip() or not turn.answer.strip():
            what = "prompt" if turn.answer.strip() else "answer"
            raise TextError(f"sample {sample.id!r}: empty {what} in turn {number + 1}; leave the sample out")
        for field, text in (("prompt", "".join(words)), ("answer", turn.answer)):
            check_text(sample.id, field, text, tokenizer, vocab_size)
        pieces.append(Piece(encode(tokenizer, (template.between if number else "") + template.prefix)))
        first = next(i for i, word in enumerate(words) if word)  # behind the images in front
        for i, word in enumerate(words):
            text = (
                (template.prompt_lead if i == first else "") + word + (template.middle if i == len(words) - 1 else "")
            )
            pieces += [None] if i else []
            pieces += [Piece(encode(tokenizer, text))] if text else []
        pieces.append(Piece([*answer_ids(turn.answer, tokenizer, template), end], answer=True))
    if (count := pieces.count(None)) != len(sample.images):
        raise TextError(
            f"sample {sample.id!r}: {len(sample.images)} images, {count} times {PLACEHOLDER}; make them equal"
        )
    return pieces
