"""Batches of images with their captions, for stages that learn which belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastmllm.data.images import load_image
from fastmllm.data.sample import Sample
from fastmllm.data.text import TextError, encode

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


def collate_captions(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    *,
    image_size: int,
    max_tokens: int,
    first: Sequence[int] = (),
    last: Sequence[int] = (),
    draw: int = 0,
) -> CaptionBatch:
    """Pack each sample's answer as the caption of its image: [first] [caption] [last].

    Args:
        samples: at least one, each with an image.
        tokenizer: of the text tower.
        image_size: side in pixels that images are resized to.
        max_tokens: of a text with what stands around it; the end of a longer caption is cut off.
        first, last: tokens around the caption, such as [CLS] and the end of text.
        draw: see `CaptionBatch`.

    Raises:
        ValueError: no samples, or no room for a caption.
        TextError: a sample without an image or without a caption.
        ImageError: an image that cannot be read.
    """
    room = max_tokens - len(first) - len(last)
    if not samples or room < 1:
        raise ValueError(f"captions: {len(samples)} samples, {room} tokens for a caption; give at least one of each")
    rows: list[list[int]] = []
    for sample in samples:
        words = encode(tokenizer, sample.answer)[:room]
        if sample.image is None or not words:
            raise TextError(f"sample {sample.id}: needs an image and a caption to learn that they belong together")
        rows.append([*first, *words, *last])
    images = [str(sample.image) for sample in samples]
    lengths = torch.tensor([0, *map(len, rows)])
    return CaptionBatch(
        input_ids=torch.tensor([token for row in rows for token in row]),
        position_ids=torch.cat([torch.arange(len(row)) for row in rows]),
        cu_seqlens=lengths.cumsum(0).int(),
        max_seqlen=max_tokens,
        pixels=torch.stack([load_image(path, image_size) for path in images]),
        image_ids=torch.tensor([_number(path) for path in images]),
        ids=[sample.id for sample in samples],
        draw=draw,
    )


def _number(path: str) -> int:
    """Return a number that other images do not have, on every rank the same."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:7], "big")
