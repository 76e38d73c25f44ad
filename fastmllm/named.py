"""What a command line names in code: module:callable."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def imported(name: str) -> Callable[..., Any]:
    """Return what "module:name" names.

    Raises:
        ValueError: no such module, or nothing callable of that name in it.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: {error}; give module:callable, with the module on PYTHONPATH") from error
    if not callable(found):
        raise ValueError(f"{name}: a {type(found).__name__}, nothing to call")
    return found
