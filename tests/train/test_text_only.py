"""Ranks without an image beside ranks with one or several, all learning, under ZeRO-3: no rank waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmllm.train.meters import read_log

HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, (HERE.parents[1], HERE, HERE.parent / "support")))
MODELS = ("vlm", "llava", "native", "across")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("text-only")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "text_only_worker.py"), str(out)]
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return out


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_learn_what_one_does(ranks: Path, model: str) -> None:
    one, two = read_log(ranks / f"{model}-1" / "log.jsonl"), read_log(ranks / f"{model}-2" / "log.jsonl")
    assert len(one) == 3
    assert [r.loss for r in two] == pytest.approx([r.loss for r in one], rel=1e-5)
    assert [r.grad_norm for r in two] == pytest.approx([r.grad_norm for r in one], rel=1e-3)
    assert [(r.tokens, r.visual_tokens) for r in two] == [(r.tokens, r.visual_tokens) for r in one]
