from __future__ import annotations

import pytest
import torch

from fastmllm.models.placing import loading_device


@pytest.mark.parametrize(
    "gpu, ranks, memory, expected",
    [
        (False, 2, 0, "cpu"), (True, 1, 7999, "cuda:0"), (True, 4, 8000, "cuda:3"), (True, 4, 7999, "cpu"),
        (True, 1, 100, "cuda:0"),
    ],
)  # fmt: skip
def test_a_large_model_of_several_ranks_stays_on_the_host(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, ranks: int, memory: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", str(ranks - 1))
    model = torch.nn.Linear(100, 10, bias=False)  # 4000 bytes
    assert str(loading_device(model)) == expected
