"""What speeds this installation up, and what is missing: pip hides why native code was not built."""

from __future__ import annotations

import importlib
import importlib.metadata

import torch

from fastmllm.kernels import _native
from fastmllm.kernels._flash_attn import flash_attn_status


def backends() -> dict[str, str]:
    """Report every optional part.

    Returns:
        Name -> "found" with the version, or why it is missing and what to do. Nothing here is needed to run.
    """
    return {
        "C++ operators": _native.EXTENSION_MISSING or "found",
        "planners": _planner(),
        "CUDA": f"found: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no device, or a CPU torch",
        "CUDA operators": _native.LIBRARY_MISSING or "found",
        "triton": _package("triton", "triton", "pip install triton"),
        "flash-attn": "; ".join(f"{name}: {state}" for name, state in flash_attn_status().items()),
        "deepspeed": _package("deepspeed", None, "pip install 'fastmllm[train]'"),
        "transformers": _package("transformers", None, "pip install 'fastmllm[hf]'"),
    }


def _planner() -> str:
    try:
        importlib.import_module("fastmllm._planner")
    except ImportError as error:
        return f"plain Python instead ({error})"
    return "found"


def _package(distribution: str, module: str | None, remedy: str) -> str:
    """Ask the metadata, then import the module that counts: a folder of that name alone proves nothing."""
    try:
        version = importlib.metadata.version(distribution)
        if module is not None:
            importlib.import_module(module)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed: {remedy}"
    except Exception as error:  # a broken installation may raise anything
        return f"installed, but cannot be imported ({type(error).__name__}: {error}): {remedy}"
    return f"found: {version}"
