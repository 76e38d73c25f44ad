"""A composed model of a recipe goes through all kinds of stage: one process, two ranks at ZeRO-2 and 3, export."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mllm_recipe import prepare, session

from fastmllm.eval.runner import CONDITIONS
from fastmllm.infer.respond import collate_for
from fastmllm.models.mllm import MLLM
from fastmllm.train.meters import StepRecord, read_log

HERE = Path(__file__).parent
STAGES = ("pretrain", "instruct", "prefer", "grpo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mllm")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """Train in one process, which takes the two ranks' micro-batches one after the other."""
    session(folder, folder / "one", "engine.accumulation=2").train()
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder: Path, one: Path) -> Path:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "mllm_worker.py"), str(folder)]
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "rank 0 done" in done.stdout
    assert "rank 1 done" in done.stdout
    return folder


def log(run: Path, stage: str) -> list[StepRecord]:
    return read_log(run / "stages" / stage / "log.jsonl")


def test_every_stage_learns_and_says_of_what(one: Path) -> None:
    for stage in STAGES:
        records = log(one, stage)
        assert len(records) == 2
        assert all(record.visual_tokens for record in records)
        assert all(math.isfinite(record.loss) for record in records)
    first, second = log(one, "prefer")
    # the start is the reference: every reward is 0, and each of the three terms costs log 2
    assert first.loss == pytest.approx(3 * math.log(2), abs=1e-4)
    assert (first.reward_chosen, first.reward_rejected) == pytest.approx((0.0, 0.0), abs=1e-5)
    assert second.margin == pytest.approx(second.reward_chosen - second.reward_rejected)
    assert second.margin != 0
    assert 0 <= second.accuracy <= 1
    assert log(one, "instruct")[0].margin is None
    assert all(0 <= record.reward <= 1 for record in log(one, "grpo"))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_learn_what_one_process_learns(one: Path, two: Path, zero_stage: int) -> None:
    for stage in STAGES:
        alone, both = log(one, stage), log(two / f"two{zero_stage}", stage)
        assert [r.loss for r in both] == pytest.approx([r.loss for r in alone], abs=5e-6), stage
        assert [(r.tokens, r.targets) for r in both] == [(r.tokens, r.targets) for r in alone], stage
    alone, both = log(one, "prefer"), log(two / f"two{zero_stage}", "prefer")
    assert [r.margin for r in both] == pytest.approx([r.margin for r in alone], abs=1e-5)
    assert [r.accuracy for r in both] == pytest.approx([r.accuracy for r in alone])


def test_an_exported_run_is_the_trained_model(folder: Path, one: Path) -> None:
    finished = session(folder, one, "engine.accumulation=2")
    finished.export(folder / "exported")
    assert (folder / "exported" / "tokenizer.json").is_file()
    loaded = MLLM.from_pretrained(folder / "exported")
    batch = collate_for(finished.model, finished.splits.train["name"][:3], with_answers=True)
    with torch.no_grad():
        assert torch.equal(loaded.logits(batch), finished.model.logits(batch))


def test_a_finished_run_is_evaluated_beside_its_controls(folder: Path, one: Path) -> None:
    limits = ["eval.limit=4", "eval.max_new_tokens=2", "engine.accumulation=2"]
    finished = session(folder, one, *limits)
    report = finished.evaluate()
    tasks = {task for task, questions in finished.splits.eval.items() if questions}
    assert {"name", "exists", "yes_no"} <= tasks
    assert {(row.task, row.condition) for row in report.rows} >= {(t, c) for t in tasks for c in CONDITIONS}
    again = session(folder, one, *limits)
    assert again.evaluate().to_json() == report.to_json()
    assert again.parts["evaluation"]["reused"]
    image = next(sample.image for sample in finished.splits.eval["name"])
    assert isinstance(finished.ask(str(image), "What is this?"), str)
    with pytest.raises(ValueError, match="resolution policy says them"):
        finished.sweep()


def test_what_is_not_finished_is_not_exported(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage 'pretrain' is missing"):
        session(folder, tmp_path / "none").export(tmp_path / "exported")


def test_sizes_of_a_vlm_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="policy says how large"):
        session(folder, tmp_path, "stages.0.visual_tokens=[4]").train()
