"""What generation and scoring ask of a model and of a packed batch of prompts."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fastmllm.models.kv_cache import KVCache
from fastmllm.models.language import LanguageModel


class PackedPrompts(Protocol):
    """Packed prompts without answers: the fields of `fastmllm.data.packing.Batch` that are read here."""

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (S+1,) int32
    max_seqlen: int
    image_index: Tensor  # (I*K,) int64
    pixels: Tensor | None  # (I, H, W, 3) uint8; None when features of `image_paths` are kept elsewhere
    ids: list[str]
    image_paths: list[str]


class Embedder(Protocol):
    """A language model with a way to turn prompts and their images into input embeddings."""

    language: LanguageModel

    def embed_batch(self, batch: Any) -> Tensor:
        """Embed tokens and images: (T, D)."""
        ...


def prompt_lengths(batch: PackedPrompts, op: str) -> list[int]:
    """Check a batch before any work and read its lengths, once.

    Args:
        batch: packed prompts.
        op: name of the caller, for the message.

    Returns:
        Tokens of each prompt, host.

    Raises:
        ValueError: no prompt, an empty one, or image places that do not match the images.
    """
    lengths: list[int] = batch.cu_seqlens.diff().tolist()
    if not lengths:
        raise ValueError(f"{op}: the batch holds no prompt")
    if min(lengths) < 1:
        place = lengths.index(min(lengths))
        raise ValueError(f"{op}: prompt {place} ({_name(batch, place)}) is empty; give it at least one token")
    total = len(batch.input_ids)
    if sum(lengths) != total or len(batch.position_ids) != total:
        raise ValueError(f"{op}: cu_seqlens ends at {sum(lengths)}, but the batch holds {total} tokens")
    places, images = len(batch.image_index), len(batch.image_paths) if batch.pixels is None else len(batch.pixels)
    if (places == 0) != (images == 0) or (images and places % images):
        raise ValueError(
            f"{op}: {places} image places do not fit {images} images; "
            "every image needs the same number of places, and every place an image"
        )
    return lengths


def prefill(model: Embedder, batch: PackedPrompts, cache: KVCache) -> Tensor:
    """Compute every prompt once and fill its row of the cache.

    Args:
        model: `language` and `embed_batch`.
        batch: packed prompts.
        cache: empty, one row a prompt.

    Returns:
        (S, D) hidden state of the last token of each prompt, after the final norm.
    """
    device = model.language.head_weight.device
    starts = batch.cu_seqlens.to(device)
    hidden = model.language(model.embed_batch(batch), batch.position_ids.to(device), starts, batch.max_seqlen, cache)
    return hidden[(starts[1:] - 1).long()]


def _name(batch: PackedPrompts, place: int) -> str:
    return repr(batch.ids[place]) if place < len(batch.ids) else "unnamed"
