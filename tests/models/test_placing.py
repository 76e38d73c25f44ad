from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch

from fastmllm.models.composition import MLLMConfig
from fastmllm.models.language import LanguageConfig
from fastmllm.models.mllm import MLLM
from fastmllm.models.placing import loading_device
from fastmllm.models.vision import VisionConfig

SMAPS = Path("/proc/self/smaps_rollup")


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


@pytest.mark.skipif(not SMAPS.exists(), reason="only Linux says which memory is a process's own")
def test_the_ranks_of_a_machine_share_a_folders_pages(tmp_path: Path) -> None:
    def own_bytes() -> int:
        gc.collect()
        found = re.search(r"^Anonymous:\s+(\d+)", SMAPS.read_text(), re.MULTILINE)
        assert found
        return 1024 * int(found[1])

    encoder = VisionConfig(width=16, depth=2, num_heads=2, patch_size=8, image_size=16)
    language = LanguageConfig(
        vocab_size=12_000, width=512, depth=2, num_heads=4, num_kv_heads=2, head_dim=128, mlp_width=1024
    )
    MLLM.from_config(MLLMConfig(encoder=encoder, language=language, image_token_id=5)).save_pretrained(tmp_path)
    before = own_bytes()
    model = MLLM.from_pretrained(tmp_path, torch.float32)
    size = sum(param.nbytes for param in model.parameters())
    assert own_bytes() - before < size / 4
    assert float(model.language.head_weight.detach().sum()) != 0  # it is there all the same
