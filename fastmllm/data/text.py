"""Chat template, tokens and label mask: what the language model reads and what it is scored on."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmllm.data.sample import Sample

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def normalise(text: str) -> str:
    """Return a text as answers are compared: fold case, width, punctuation and white space; drop a leading article."""
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    text = re.sub(r"[^\w\s'-]+", " ", text)
    text = re.sub(r"^(?:an?|the)\s+", "", text.strip())
    return " ".join(text.split())


class TextError(ValueError):
    """A prompt or an answer that cannot be tokenised; the message names the sample and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """The text around prompt and answer: prefix, image, prompt, middle, answer, suffix.

    The default is SmolLM2-Instruct's (ChatML) without its system message.

    Args:
        prefix: before the image and the prompt.
        prompt_lead: right before the prompt.
        middle: between prompt and answer.
        answer_lead: right before the answer, tokenised with it (a byte-level vocabulary has " owl" as one token).
        suffix: after the answer; must be one token, the one that ends generation.
        between: between the suffix and the next turn's prefix.
        system: instructions before the first turn; {} is their text.
    """

    prefix: str = "<|im_start|>user\n"
    prompt_lead: str = ""
    middle: str = "<|im_end|>\n<|im_start|>assistant\n"
    answer_lead: str = ""
    suffix: str = "<|im_end|>"
    between: str = "\n"
    system: str = "<|im_start|>system\n{}<|im_end|>\n"

    def __post_init__(self) -> None:
        if self.system.count("{}") != 1:
            raise ValueError(f"chat template: system {self.system!r} must have one {{}}, where the instructions go")


CHAT = ChatTemplate()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A sample in tokens: prefix, (image), prompt with `middle`, answer with the end token."""

    prefix: list[int]
    prompt: list[int]
    answer: list[int]


def end_token(tokenizer: Tokenizer, template: ChatTemplate = CHAT) -> int:
    """Return the id that ends an answer.

    Raises:
        TextError: the template's suffix is not one token of this tokenizer.
    """
    ids = tokenizer.encode(template.suffix, add_special_tokens=False).ids
    if len(ids) != 1:
        raise TextError(
            f"chat template: suffix {template.suffix!r} is {len(ids)} tokens, not one; use the tokenizer's end token"
        )
    return int(ids[0])


def tokenise(
    sample: Sample, tokenizer: Tokenizer, template: ChatTemplate = CHAT, *, vocab_size: int | None = None
) -> Tokens:
    """Turn a sample into tokens.

    Args:
        sample: prompt and answer.
        tokenizer: of the language model.
        template: text around them.
        vocab_size: rows of the model's embedding, where fewer than the tokenizer's ids.

    Raises:
        TextError: empty prompt or answer, text that the tokenizer cannot represent, an id outside of the
            vocabulary, or a special token inside the text.
    """
    if not sample.prompt.strip():
        raise TextError(f"sample {sample.id!r}: empty prompt; give it one or leave it out")
    if not sample.answer.strip():
        raise TextError(f"sample {sample.id!r}: empty answer (no label to learn); give it one or leave it out")
    for field, text in (("prompt", sample.prompt), ("answer", sample.answer)):
        check_text(sample.id, field, text, tokenizer, vocab_size)
    end = end_token(tokenizer, template)
    return Tokens(
        prefix=encode(tokenizer, template.prefix),
        prompt=encode(tokenizer, template.prompt_lead + sample.prompt + template.middle),
        answer=[*answer_ids(sample.answer, tokenizer, template), end],
    )


def answer_ids(answer: str, tokenizer: Tokenizer, template: ChatTemplate = CHAT) -> list[int]:
    """Tokenise an answer as it stands in a sequence, without its end."""
    return encode(tokenizer, template.answer_lead + answer)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenise a text as it is, without tokens around it."""
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def check_text(sample_id: str, field: str, text: str, tokenizer: Tokenizer, vocab_size: int | None) -> None:
    """Look for text that a model cannot read: special tokens, and what is outside of the vocabulary.

    Raises:
        TextError: names sample and field.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.special and token.content in text:
            raise TextError(f"sample {sample_id!r}: {field} contains the special token {token.content!r}; remove it")
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None and unknown in encoding.tokens:
        raise TextError(f"sample {sample_id!r}: {field} {text!r} has text outside of the vocabulary; reword it")
    # A tokenizer without an unknown token drops such text silently: look for characters that no token covers.
    covered = {i for start, end in encoding.offsets for i in range(start, end)}
    lost = [char for i, char in enumerate(text) if i not in covered and not char.isspace()]
    if lost:
        raise TextError(f"sample {sample_id!r}: {field} {text!r}: {lost[0]!r} is outside of the vocabulary; reword it")
    if vocab_size is not None and (largest := max(encoding.ids, default=0)) >= vocab_size:
        raise TextError(
            f"sample {sample_id!r}: {field} {text!r} has token {largest}, outside of the model's {vocab_size}; "
            "use the model's own tokenizer"
        )


def screen(
    samples: Iterable[Sample],
    tokenizer: Tokenizer,
    template: ChatTemplate = CHAT,
    *,
    vocab_size: int | None = None,
    visual: Sequence[str] = ("caption", "scene"),
) -> tuple[list[Sample], Counter[str]]:
    """Keep the samples that can be learned from.

    Args:
        samples: what to look through.
        tokenizer, template, vocab_size: as `tokenise`.
        visual: tasks that make no sense without an image.

    Returns:
        The kept samples in their order, and reason -> count of the others.
    """
    kept: list[Sample] = []
    skipped: Counter[str] = Counter()
    good: set[tuple[str, str]] = set()  # (prompt, answer) repeats from image to image
    for sample in samples:
        if sample.task in visual and sample.image is None:
            skipped["caption without an image"] += 1
            continue
        if (sample.prompt, sample.answer) not in good:
            try:
                tokenise(sample, tokenizer, template, vocab_size=vocab_size)
            except TextError as error:
                reason = str(error)
                known = ("empty prompt", "empty answer", "special token", "vocabulary")
                skipped[next((key for key in known if key in reason), "text outside of the vocabulary")] += 1
                continue
            good.add((sample.prompt, sample.answer))
        kept.append(sample)
    return kept, skipped
