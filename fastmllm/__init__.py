"""The visual half of a multimodal LLM at the speed of light, for training and for inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmllm.compression import compress as compress
    from fastmllm.hf import patch as patch
    from fastmllm.hf import unpatch as unpatch

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "compress":  # on first use: `import fastmllm` alone imports no torch
        from fastmllm.compression import compress

        return compress
    if name in ("patch", "unpatch"):
        from fastmllm import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
