"""Hugging Face models that compute with fastmllm's operators: `patch`, `unpatch`, `relevance`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastmllm.hf.compress.given import relevance
from fastmllm.hf.patch import PatchError, patch, unpatch
from fastmllm.hf.report import Report, Row

if TYPE_CHECKING:
    from fastmllm.hf.trainer import FastMLLMCallback as FastMLLMCallback

__all__ = ["FastMLLMCallback", "PatchError", "Report", "Row", "patch", "relevance", "unpatch"]


def __getattr__(name: str) -> Any:
    if name == "FastMLLMCallback":  # on first use: it needs transformers itself
        from fastmllm.hf.trainer import FastMLLMCallback

        return FastMLLMCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
