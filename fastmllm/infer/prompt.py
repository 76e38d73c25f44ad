"""What generation and scoring ask of a model and of a packed batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor

from fastmllm.data.packing import Batch
from fastmllm.models.continuation import Continuation
from fastmllm.models.inputs import Inputs
from fastmllm.models.kv_cache import KVCache
from fastmllm.models.language import LanguageModel


class PackedPrompts(Protocol):
    """Packed prompts without answers: what is read here of `data.packing.Batch` and `models.inputs.Inputs`."""

    @property
    def position_ids(self) -> Tensor:
        """Positions of all tokens, (T,) or (3, T)."""
        ...

    @property
    def cu_seqlens(self) -> Tensor:
        """Boundaries (S+1,) int32."""
        ...

    @property
    def max_seqlen(self) -> int:
        """The longest prompt."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """Names of the samples."""
        ...


class Starter(Protocol):
    """A language model with a way to run prompts and their images (`VLM`, `MLLM`)."""

    language: LanguageModel

    def start(self, batch: Any, cache: KVCache | None = None) -> tuple[Tensor, Continuation]:
        """Run a whole batch: hidden states (T, D) of all tokens, and how the sequences go on."""
        ...


def prompt_lengths(batch: PackedPrompts, op: str) -> list[int]:
    """Check a batch before any work and read its lengths, once.

    Args:
        batch: packed prompts.
        op: name of the caller, for the message.

    Returns:
        Tokens of each prompt, host.

    Raises:
        ValueError: no prompt, an empty one, or boundaries that do not fit the tokens.
    """
    lengths: list[int] = batch.cu_seqlens.diff().tolist()
    if not lengths:
        raise ValueError(f"{op}: the batch holds no prompt")
    if min(lengths) < 1:
        place = lengths.index(min(lengths))
        raise ValueError(f"{op}: prompt {place} ({_name(batch, place)}) is empty; give it at least one token")
    total = batch.position_ids.shape[-1]
    if sum(lengths) != total:
        raise ValueError(f"{op}: cu_seqlens ends at {sum(lengths)}, but the batch holds {total} tokens")
    return lengths


def prompt_ids(batch: Any) -> list[list[int]]:
    """Return the tokens of each prompt; a `Batch` has a word's id at its visual tokens, which are left out there.

    Args:
        batch: packed prompts with `input_ids`, as `Batch` and `Inputs` have them.
    """
    ids = batch.plan.input_ids if isinstance(batch, Inputs) else batch.input_ids
    shown = set(batch.image_index.tolist()) if isinstance(batch, Batch) else set()
    bounds: list[int] = batch.cu_seqlens.tolist()
    rows: list[int] = ids.tolist()
    return [[rows[at] for at in range(start, end) if at not in shown] for start, end in pairwise(bounds)]


def prefill(model: Starter, batch: PackedPrompts, cache: KVCache) -> tuple[Tensor, Continuation]:
    """Compute every prompt once and fill its row of the cache.

    Args:
        model: `language` and `start`.
        batch: packed prompts.
        cache: empty, one row a prompt.

    Returns:
        (S, D) hidden state of the last token of each prompt, after the final norm; and how the prompts go on.
    """
    hidden, continuation = model.start(batch, cache)
    ends = batch.cu_seqlens if continuation.cu_seqlens is None else continuation.cu_seqlens
    return hidden[(ends[1:].long() - 1).to(hidden.device)], continuation


def _name(batch: PackedPrompts, place: int) -> str:
    return repr(batch.ids[place]) if place < len(batch.ids) else "unnamed"
