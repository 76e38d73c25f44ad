"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest
import torch
from oracle import Guard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels run: a GPU, or CPU tensors in the interpreter."""
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        import bf16_interpreter

        bf16_interpreter.install()
    return DEVICE


@pytest.fixture
def guard():
    """Guard every tensor of a test, the launcher's own outputs included, and check the zones at the end."""
    memory = Guard()
    yield memory
    memory.check()
