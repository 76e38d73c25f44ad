"""Under DeepSpeed ZeRO-3, whose weights are there only while their own module runs."""

from __future__ import annotations

import pytest
import torch
from ranks import results
from tiny_hf_families import NAMED

pytest.importorskip("deepspeed")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_two_ranks_learn_the_same(name, tmp_path):
    runs = {}
    for when in ("never", "before", "after"):
        (tmp_path / when).mkdir()
        runs[when] = results("hf_zero3.py", 2, tmp_path / when, name, when)[0]
    plain = runs["never"]
    for when in ("before", "after"):
        torch.testing.assert_close(runs[when]["losses"], plain["losses"])
        for weight, value in plain["weights"].items():
            torch.testing.assert_close(runs[when]["weights"][weight], value, msg=weight)
        # weights that ZeRO-3 already holds cannot be read, so the one that reads its parts' is left
        assert set(runs[when]["replaced"]) >= NAMED[name].ops - ({"gelu_mlp"} if when == "after" else set())
        assert all("gelu_mlp" in why for why in runs[when]["fallbacks"])
