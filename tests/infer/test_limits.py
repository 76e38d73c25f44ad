"""What does not fit is said with its numbers, before any work."""

from __future__ import annotations

import pytest
import torch

from fastmllm.infer import limits
from fastmllm.infer.limits import check_context, check_memory, free_bytes, kv_bytes
from fastmllm.models.language import LanguageConfig, LanguageModel


@pytest.fixture
def language() -> LanguageModel:
    config = LanguageConfig(
        vocab_size=8, width=16, depth=3, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=8, max_positions=20
    )
    return LanguageModel(config)


def test_a_request_that_is_too_long_is_named(language: LanguageModel) -> None:
    check_context(language, [10, 4], [10, 16], "op")
    with pytest.raises(ValueError, match="request 1: 15 prompt \\+ 8 new tokens are 3 more than the context of 20"):
        check_context(language, [10, 15], [8, 8], "op")


def test_keys_and_values_take_what_a_cache_takes(language: LanguageModel) -> None:
    cache = language.new_cache(5, 7)
    assert kv_bytes(language, 5, 7) == sum(t.nbytes for t in cache.keys + cache.values)


def test_memory_that_does_not_suffice(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20
    check_memory(language, [1] * 4, 10, "op")
    one = kv_bytes(language, 1, 2**20)
    monkeypatch.setattr(limits, "free_bytes", lambda device: 2 * one + 1)
    check_memory(language, [1, 1], 2**20, "op")
    with pytest.raises(RuntimeError, match=r"3 sequences of 1048576 tokens take 0.56 GiB, cpu has 0.38 .* give 2 seq"):
        check_memory(language, [1, 1, 1], 2**20, "op")
