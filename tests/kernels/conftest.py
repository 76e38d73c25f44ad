"""Fixtures of the kernel tests."""

from __future__ import annotations

import sys

import pytest
import torch
from oracle import Guard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels run: a GPU, or CPU tensors in the interpreter."""
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        import triton_interpreter

        triton_interpreter.install()
    return DEVICE


MOST_ITERATIONS = 50


@pytest.fixture(autouse=True)
def few_iterations():
    """Keep interpreted tests short: a program or a trip of its loop takes milliseconds."""
    interpreter = sys.modules.get("triton_interpreter")
    if interpreter is None:
        yield
        return
    interpreter.iterations = 0
    yield
    count = interpreter.iterations
    assert count <= MOST_ITERATIONS, f"{count} program iterations: use a smaller shape"


@pytest.fixture
def guard():
    """Guard every tensor of a test, the launcher's own outputs included, and check the zones at the end."""
    memory = Guard()
    yield memory
    memory.check()
