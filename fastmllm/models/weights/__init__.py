"""Checkpoints in and out. The readers that a file format needs are imported on use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "load_language": "language",
    "load_tokenizer": "language",
    "save_language": "language",
    "load_vision": "vision",
    "save_vision": "vision",
}

__all__ = ["load_language", "load_tokenizer", "load_vision", "save_language", "save_vision"]


def __getattr__(name: str) -> Any:
    """Import the file that owns a public name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
