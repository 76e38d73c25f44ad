"""Load the native code: importing the extension registers its operators for the CPU, a library those for CUDA."""

from __future__ import annotations

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from ._sources import FAILED, outdated

LIBRARY = Path(__file__).with_name("_cuda.so")  # built by csrc/build_cuda.py
SOURCES = Path(__file__).resolve().parent.parent / "csrc"  # in a checkout only


def _load_extension() -> str | None:
    here = Path(__file__)
    binaries = [b for suffix in EXTENSION_SUFFIXES if (b := here.with_name(f"_C{suffix}")).exists()]
    if any(outdated(binary, SOURCES) for binary in binaries):
        return "built from other sources than csrc/ holds: run `python setup.py build_ext --inplace`"
    try:
        importlib.import_module("._C", __package__)
    except ImportError as error:
        if "_C" in str(error) and "No module named" in str(error):
            failed = here.with_name(FAILED)
            reason = (
                failed.read_text().strip() if failed.is_file() else "no build was tried; install g++ and python3-dev"
            )
            return f"not built: {reason}; then run `FASTMLLM_BUILD=1 pip install -e . --no-build-isolation -v`"
        return f"built, but cannot be loaded ({error}): build it again"
    return None


def _load_library(path: Path = LIBRARY) -> str | None:
    if not path.exists():
        return "not built: with nvcc installed, run `python csrc/build_cuda.py`"
    if outdated(path, SOURCES):
        return "built from other sources than csrc/ holds: run `python csrc/build_cuda.py`"
    if not torch.cuda.is_available():
        return "built, but torch finds no CUDA device"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"built, but cannot be loaded ({error}): build it again on this machine"
    return None


EXTENSION_MISSING = _load_extension()  # None, or why the CPU operators run as plain torch
LIBRARY_MISSING = _load_library()  # None, or why CUDA operators written in CUDA C++ run as plain torch
