"""What does not fit, said before any work: prompts in the context, keys and values in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastmllm.models.language import LanguageModel


def check_context(language: LanguageModel, lengths: Sequence[int], new: Sequence[int], op: str) -> None:
    """Compare prompts with the model's context.

    Args:
        language: of the model.
        lengths: tokens of each prompt, visual ones among them.
        new: most tokens of each answer.
        op: name of the caller, for the message.

    Raises:
        ValueError: names every prompt that does not fit, and by how many tokens.
    """
    context = language.config.max_positions
    long = [
        f"request {place}: {length} prompt + {more} new tokens are {length + more - context} more"
        for place, (length, more) in enumerate(zip(lengths, new, strict=True))
        if length + more > context
    ]
    if long:
        shown = "; ".join(long[:8]) + ("" if len(long) <= 8 else f"; and {len(long) - 8} others")
        raise ValueError(
            f"{op}: {shown} than the context of {context}: shorten the text, show fewer or smaller images, or lower "
            "max_new_tokens"
        )


def kv_bytes(language: LanguageModel, batch: int, max_length: int) -> int:
    """Return the bytes of the keys and values of `batch` sequences of up to `max_length` tokens."""
    config = language.config
    values = 2 * config.depth * batch * config.num_kv_heads * max_length * config.head_dim
    return values * language.head_weight.element_size()


def free_bytes(device: torch.device) -> int | None:
    """Return what a device has left; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def check_memory(language: LanguageModel, lengths: Sequence[int], max_length: int, op: str) -> None:
    """Compare the keys and values of a batch with the memory that is left.

    Raises:
        RuntimeError: says both, and how many sequences would fit.
    """
    device = language.head_weight.device
    free, needed = free_bytes(device), kv_bytes(language, len(lengths), max_length)
    if free is None or needed <= free:
        return
    fit = free * len(lengths) // needed
    raise RuntimeError(
        f"{op}: keys and values of {len(lengths)} sequences of {max_length} tokens take {needed / 2**30:.2f} GiB, "
        f"{device} has {free / 2**30:.2f} GiB left: give {fit} sequences at a time"
        + ("" if fit else ", that is none: shorten the prompts or lower max_new_tokens")
    )
