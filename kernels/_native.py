"""Load the native code: importing the extension registers its operators for the CPU, a library those for CUDA."""

from __future__ import annotations

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_cuda.so")  # built by csrc/build_cuda.py
SOURCES = Path(__file__).resolve().parent.parent / "csrc"  # in a checkout only


def _outdated(binary: Path, *patterns: str) -> str | None:
    """Return a source that is newer: its operators may have other arguments, which no loader checks."""
    built = binary.stat().st_mtime
    return next((p.name for pattern in patterns for p in SOURCES.glob(pattern) if p.stat().st_mtime > built), None)


def _load_extension() -> str | None:
    here = Path(__file__)
    for binary in (b for suffix in EXTENSION_SUFFIXES if (b := here.with_name(f"_C{suffix}")).exists()):
        if source := _outdated(binary, "*.h", "ops/*.cpp"):
            return f"older than csrc/{source}: build them again with `pip install -e . --no-build-isolation`"
    try:
        importlib.import_module("._C", __package__)
    except ImportError as error:
        if "_C" in str(error) and "No module named" in str(error):
            return "not built: install g++, then run `FASTMLLM_BUILD=1 pip install -e . --no-build-isolation -v`"
        return f"built, but cannot be loaded ({error}): build it again"
    return None


def _load_library(path: Path = LIBRARY) -> str | None:
    if not path.exists():
        return "not built: with nvcc installed, run `python csrc/build_cuda.py`"
    if source := _outdated(path, "*.cu"):
        return f"older than csrc/{source}: run `python csrc/build_cuda.py`"
    if not torch.cuda.is_available():
        return "built, but torch finds no CUDA device"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"built, but cannot be loaded ({error}): build it again on this machine"
    return None


EXTENSION_MISSING = _load_extension()  # None, or why the CPU operators run as plain torch
LIBRARY_MISSING = _load_library()  # None, or why CUDA operators written in CUDA C++ run as plain torch
