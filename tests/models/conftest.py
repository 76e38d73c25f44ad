"""Fixtures of the models' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a function: name of a family -> the folder that transformers wrote of its tiny model; tests copy it."""
    from tests.support.tiny_mllm import oracle  # imports transformers

    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            oracle(name)[0].save_pretrained(folders[name])
        return folders[name]

    return folder
