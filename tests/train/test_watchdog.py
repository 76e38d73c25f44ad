"""Ranks that die, stop or fail: the others end soon, and say who it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastmllm.train.engine import EngineConfig
from fastmllm.train.watchdog import Watchdog

HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, (HERE.parents[1], HERE, HERE.parent, HERE.parent / "support")))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("faults")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "faults_worker.py"), str(out)]
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"out": out}


def test_a_killed_rank_is_named_at_once(faults: dict[str, Any]) -> None:
    said = (faults["out"] / "killed.said.0").read_text()
    assert (
        f"RankLostError: toy: rank 1 ({os.uname().nodename}, process {faults['killed']['pid']}) has died; rank 0"
        in said
    )
    assert "step-00000004 is kept: run the same again to go on" in said
    assert (faults["killed"]["code"], faults["killed"]["seconds"] < 20) == (1, True)


def test_a_stopped_rank_ends_the_others(faults: dict[str, Any]) -> None:
    said = (faults["out"] / "stopped.said.0").read_text()
    assert (
        f"process {faults['stopped']['pid']}) has not answered for 2 s: stuck, stopped or gone; rank 0 ends; " in said
    )
    assert "step-00000004 is kept: run the same again to go on" in said
    assert faults["stopped"]["code"] == 1
    assert faults["stopped"]["gone"]  # torchrun has nothing to wait for
    assert 1.5 < faults["stopped"]["seconds"] < 20


def test_a_stopped_store_is_known(faults: dict[str, Any]) -> None:
    said = (faults["out"] / "stopped-first.said.1").read_text()
    assert (
        f"process {faults['stopped-first']['pid']}), where the ranks met, has not answered for 2 s; rank 1 ends" in said
    )
    assert faults["stopped-first"]["code"] == 1
    assert 1.5 < faults["stopped-first"]["seconds"] < 20


def test_a_rank_that_failed_and_stays_is_named_with_its_error(faults: dict[str, Any]) -> None:
    said = (faults["out"] / "failed.said.0").read_text()
    assert "failed: ZeroDivisionError: in the data; rank 0 ends" in said
    assert (faults["failed"]["code"], faults["failed"]["seconds"] < 20) == (1, True)
    assert not faults["failed"]["gone"]  # it may have something to say yet


def test_long_steps_and_pauses_are_no_alarm(faults: dict[str, Any]) -> None:
    said = [(faults["out"] / f"slow.said.{rank}").read_text() for rank in (0, 1)]
    assert [code for code, _ in faults["slow"]] == [0, 0], said
    assert (faults["out"] / "slow" / "result.json").exists()


def test_nothing_is_watched_alone_or_at_no_limit() -> None:
    class Alone:
        rank, world_size = 0, 1

    with Watchdog(Alone(), 20.0, what="", kept=lambda: None) as watchdog:  # type: ignore[arg-type]
        assert watchdog._others == []
    Alone.world_size = 2
    with Watchdog(Alone(), 0.0, what="", kept=lambda: None) as watchdog:  # type: ignore[arg-type]
        assert watchdog._others == []
    with pytest.raises(ValueError, match="heartbeat_s is -1"):
        EngineConfig(heartbeat_s=-1)
