"""20 steps equal 10, a SIGKILL and 10 more, to the bit: losses, weights and what was left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_vlm import colour_photos

HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, (HERE.parents[1], HERE, HERE.parent, HERE.parent / "support")))
STAGES = ("plain-1", "plain-2", "shards-1", "shards-2", "packed-2", "mixture-2", "preferred-2", "sampled-2")


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kills")
    colour_photos(out / "photos", count=1)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "CUDA_VISIBLE_DEVICES": ""}
    environment["FASTMLLM_CACHE"] = str(out / "cache")
    command = [sys.executable, str(HERE / "kills_worker.py"), str(out), str(out / "photos")]
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return out


def the(pattern: str, folder: Path) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in the("log.jsonl", folder).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key in ("step", "loss", "grad_norm", "lr")} for line in lines]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_or_not_it_learns_the_same(kills: Path, stage: str) -> None:
    straight, cut = kills / stage / "straight", kills / stage / "cut"
    assert log(cut) == log(straight)
    assert [line["step"] for line in log(cut)] == list(range(1, 21))
    expected = load_file(the("trainable.safetensors", straight))
    for name, value in load_file(the("trainable.safetensors", cut)).items():
        assert torch.equal(value, expected[name]), name


def test_a_budget_is_filled_by_what_is_said(kills: Path) -> None:
    lines = [json.loads(line) for line in the("log.jsonl", kills / "packed-2" / "cut").read_text().splitlines()]
    assert [1 - line["tokens"] / (2 * 170) for line in lines] == pytest.approx([line["unfilled"] for line in lines])
    assert {line["samples"] for line in lines} - {2}
    assert sorted(path.name for path in (kills / "packed-2").rglob("packing-*")) == sorted(
        2 * [f"packing-{r}.jsonl" for r in range(2)]
    )
