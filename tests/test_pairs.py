"""Stages that learn from pairs, by recipe: a small BLIP-2 on one rank and two, killed and run again; what follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_recipe import prepare, session
from safetensors.torch import load_file
from shard_recipe import NOTHING, recipe_of
from tiny_vlm import tiny_vlm

from fastmllm.data.text import end_token
from fastmllm.models.dual_encoder import DualEncoder
from fastmllm.pairs import Learners, format_of, pairs_of
from fastmllm.run import cache_features, train_stage
from fastmllm.streamed import StreamedBatches
from fastmllm.train.engine import EngineConfig
from fastmllm.train.pairs import ContrastiveConfig
from fastmllm.train.stages import StageConfig

HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, (HERE.parent, HERE / "train", HERE / "support")))
STAGES = ("towers", "queries", "pretrain", "instruct")
CONTRAST = StageConfig(
    name="towers", kind="contrastive", steps=2, batch_size=3, eps=1e-5,
    trainable={"vision": 1e-2, "language.model.*": 1e-2, "heads": 1e-2}, contrastive=ContrastiveConfig(width=8),
)  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two ranks at ZeRO-2, once straight through and once killed in the Q-Former's stage."""
    out = tmp_path_factory.mktemp("blip2")
    prepare(out)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "train" / "blip2_worker.py"), str(out)]
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return out


@pytest.fixture(scope="module")
def one(two: Path) -> Any:
    """Train in one process, by what `fastmllm train` calls; two micro-batches take the place of two ranks."""
    finished = session(two, two / "one", recipe="from_pairs")
    finished.train()
    return finished


def log(stage: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def test_killed_or_not_the_stages_learn_the_same(two: Path) -> None:
    for stage in STAGES:
        assert log(two / "cut" / stage) == log(two / "straight" / stage), stage
        expected = load_file(two / "straight" / stage / "trainable.safetensors")
        for name, value in load_file(two / "cut" / stage / "trainable.safetensors").items():
            assert torch.equal(value, expected[name]), (stage, name)


def test_micro_batches_are_contrasted_as_ranks_are(two: Path, one: Any) -> None:
    for stage in STAGES:
        both, alone = log(two / "straight" / stage), log(two / "one" / "stages" / stage)
        assert len(alone) == 2
        for here, there in zip(alone, both, strict=True):
            assert here == pytest.approx(there, rel=1e-4), stage


def test_a_stage_goes_on_with_what_the_one_before_learned(two: Path, one: Any) -> None:
    """The tower is that of the contrast, the Q-Former's shared part changed in its own stage and in those behind it."""
    folder, model = two / "one" / "stages", one.model
    fresh = session(two, two / "fresh", recipe="from_pairs").model
    towers, queries, pretrain = (load_file(folder / name / "trainable.safetensors") for name in STAGES[:3])
    tower = {name: value for name, value in towers.items() if name.startswith("vision.")}
    assert tower
    for name, value in tower.items():
        assert torch.equal(model.get_parameter(f"images.{name}"), value), name
        assert not torch.equal(fresh.get_parameter(f"images.{name}"), value), name
    name = "layers.0.cross.kv.weight"
    stage_1, stage_2 = queries[f"pretraining.qformer.{name}"], pretrain[f"images.connector.qformer.{name}"]
    start = fresh.get_parameter(f"images.connector.qformer.{name}")
    # one step of AdamW moves a weight by its rate, 1e-3, and each stage has two
    assert 1e-4 < (stage_1 - start).abs().max() < 2.1e-3
    assert 1e-4 < (stage_2 - stage_1).abs().max() < 2.1e-3


def test_equal_stages_go_on_with_the_same_heads() -> None:
    model = tiny_vlm()
    learners = Learners(model)
    made = learners(CONTRAST)
    assert isinstance(made, DualEncoder)
    assert made.vision is model.vision
    assert learners(replace(CONTRAST, name="larger", image_size=64)) is made
    assert learners(replace(CONTRAST, contrastive=ContrastiveConfig(width=9))) is not made
    assert learners(StageConfig(name="s", steps=1, trainable={"connector": 1.0})) is model


def test_shards_hold_pairs_and_every_micro_batch_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMLLM_CACHE", str(tmp_path / "cache"))
    sources = recipe_of(tmp_path).stages[0].sources  # talks with none, one and two images, one torn
    stage, model = replace(CONTRAST, sources=sources), tiny_vlm()
    pairs, engine = format_of(model, stage), EngineConfig(accumulation=2)
    batches = StreamedBatches(model, stage, engine, tmp_path / "out", pairs=pairs)
    made = [batches(index) for index in range(8)]
    assert {len(batch.ids) for batch in made} == {3}
    assert [batch.draw for batch in made] == [0, 0, 1, 1, 2, 2, 3, 3]
    end = end_token(model.tokenizer, model.config)
    assert all((batch.input_ids[batch.cu_seqlens[1:].long() - 1] == end).all() for batch in made)
    cache_features(model, [])
    result = train_stage(model, NOTHING, stage, engine, tmp_path / "run")
    assert result.targets == 2 * 2 * 3
    listed = [json.loads(line) for line in (tmp_path / "run" / "towers" / "skipped.jsonl").read_text().splitlines()]
    reasons = {item["reason"] for item in listed}
    assert {"missing file", "unusable text"} <= reasons  # no picture or two are no pair
    assert model.feature_cache is None  # it is of another encoder now


def test_what_is_no_stage_of_pairs_is_refused(two: Path) -> None:
    model, trained = tiny_vlm(), {"name": [], "yes_no": []}
    with pytest.raises(ValueError, match=r"kind qformer trains the Q-Former .* model\.composition\.connector=qformer"):
        Learners(model)(replace(CONTRAST, kind="qformer"))
    with pytest.raises(ValueError, match="answers to yes_no do not describe an image"):
        pairs_of(model, trained, {"yes_no": 1.0}, CONTRAST, EngineConfig())
    with pytest.raises(ValueError, match="20 px is no multiple of 8"):
        format_of(model, replace(CONTRAST, image_size=20))
    with pytest.raises(ValueError, match="leave visual_tokens and balance_steps out"):
        replace(CONTRAST, visual_tokens=(4,))
