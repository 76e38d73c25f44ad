"""Batches of images with their captions, for stages that learn which belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastmllm.data.images import load_image
from fastmllm.data.sample import Conversation, Sample
from fastmllm.data.text import TextError, check_text, encode
from fastmllm.data.turns import images_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(slots=True)
class CaptionBatch:
    """S pairs of an image and a text.

    Args:
        input_ids: (T,) int64, the texts one after the other.
        position_ids: (T,) int64, restarting in each text.
        cu_seqlens: (S + 1,) int32.
        max_seqlen: the same in every batch, a host number.
        pixels: (S, H, W, 3) uint8.
        image_ids: (S,) int64, equal for texts of one image.
        ids: S sample ids.
        draw: seeds what is drawn while the batch is scored; the same on all ranks of a step.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    pixels: torch.Tensor
    image_ids: torch.Tensor
    ids: list[str]
    draw: int

    @property
    def num_targets(self) -> int:
        """S: a step's loss is the mean over its pairs."""
        return len(self.ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioned:
    """A pair, ready to be batched.

    Args:
        id: of the sample.
        tokens: of the text, with what stands around it.
        image: path.
        pixels: (H, W, 3) uint8.
    """

    id: str
    tokens: list[int]
    image: str
    pixels: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionFormat:
    """How a sample becomes a pair: [first] [caption] [last], and its image as a square.

    Args:
        tokenizer: of the text tower.
        image_size: side in pixels that images are resized to.
        max_tokens: of a text with what stands around it; the end of a longer caption is cut off.
        first, last: tokens around the caption, such as [CLS] and the end of text.
        vocab_size: as `fastmllm.data.text.tokenise`.

    Raises:
        ValueError: no room for a caption.
    """

    tokenizer: Tokenizer
    image_size: int
    max_tokens: int
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.room < 1:
            raise ValueError(
                f"captions: {self.max_tokens} tokens leave no room for a caption between {len(self.first)} and "
                f"{len(self.last)} others; give more"
            )

    @property
    def room(self) -> int:
        """Tokens of a caption."""
        return self.max_tokens - len(self.first) - len(self.last)

    def read(self, sample: Sample | Conversation) -> Captioned:
        """Tokenise a caption, the (first) answer, and load its image.

        Raises:
            TextError: not exactly one image, or no caption that the tower reads.
            ImageError: an image that cannot be read.
        """
        images = images_of(sample)
        text = sample.answer if isinstance(sample, Sample) else sample.turns[0].answer
        words = encode(self.tokenizer, text)[: self.room]
        if len(images) != 1 or not words:
            raise TextError(
                f"sample {sample.id}: has {len(images)} images and the caption {text!r}; one image and its caption are "
                "needed to learn that they belong together"
            )
        check_text(sample.id, "caption", text, self.tokenizer, self.vocab_size)
        pixels = load_image(images[0], self.image_size)
        return Captioned(id=sample.id, tokens=[*self.first, *words, *self.last], image=images[0], pixels=pixels)

    def batch(self, pairs: Sequence[Captioned], draw: int) -> CaptionBatch:
        """Pack pairs, at least one; `draw` as in `CaptionBatch`."""
        if not pairs:
            raise ValueError("captions: no samples; give at least one")
        lengths = torch.tensor([0, *(len(pair.tokens) for pair in pairs)])
        return CaptionBatch(
            input_ids=torch.tensor([token for pair in pairs for token in pair.tokens]),
            position_ids=torch.cat([torch.arange(len(pair.tokens)) for pair in pairs]),
            cu_seqlens=lengths.cumsum(0).int(),
            max_seqlen=self.max_tokens,
            pixels=torch.stack([pair.pixels for pair in pairs]),
            image_ids=torch.tensor([_number(pair.image) for pair in pairs]),
            ids=[pair.id for pair in pairs],
            draw=draw,
        )


def _number(path: str) -> int:
    """Return a number that other images do not have, on every rank the same."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:7], "big")
