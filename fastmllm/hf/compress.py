"""Visual-token compression inside of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastmllm.compression import Placement
from fastmllm.hf.fusion import Fusion


def compress_fusions(
    model: nn.Module, compress: Placement | str | None
) -> Iterator[tuple[str, nn.Module, type[Fusion], dict[str, Any]]]:
    """Yield the modules that take part in compression: name, module, what it computes with, what is kept on it.

    Raises:
        ValueError: this model cannot be compressed so.
    """
    if compress is not None:
        raise ValueError(f"patch: {type(model).__name__} cannot be compressed yet")
    yield from ()
