"""Stages that learn from pairs, and exports, under every ZeRO stage: one process here, two ranks in pairs_worker.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs_toy import PAIR_RULES, llava, pair_run, spoken
from safetensors.torch import load_file
from tiny_vlm import colour_photos
from train_toy import trainer, values

from fastmllm.train.meters import read_log

HERE = Path(__file__).parent
PAIR_RUNS = ("clip2", "clip3", "siglip3", "qformer2", "qformer3", "clip2x2", "siglip3x2", "qformer3x2")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_photos(tmp_path_factory.mktemp("photos"), count=3)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "pairs_worker.py"), str(out), str(photos)]
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return out


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> dict[str, Any]:
    """Train each kind on one rank; return its trainer."""
    out = tmp_path_factory.mktemp("one")
    made = {kind: pair_run(out / kind, photos, kind, 4, 1) for kind in PAIR_RULES}
    for run in made.values():
        run.run()
    return made


class Stop(Exception):
    pass


def losses(out: Path) -> list[float]:
    return [record.loss for record in read_log(out / "log.jsonl")]


@pytest.mark.parametrize("kind", ["clip", "qformer"])
def test_pairs_learn_and_resume_to_the_bit(one_rank: dict[str, Any], tmp_path: Path, photos: Path, kind: str) -> None:
    straight = one_rank[kind]
    assert min(losses(straight.out_dir)[1:]) < losses(straight.out_dir)[0]

    def stop(record: Any) -> None:
        if record.step == 2:
            raise Stop

    with pytest.raises(Stop):
        pair_run(tmp_path / "b", photos, kind, 4, 1, save_every=1, on_step=stop).run()
    resumed = pair_run(tmp_path / "b", photos, kind, 4, 1, save_every=1)
    resumed.run()
    assert losses(tmp_path / "b") == losses(straight.out_dir)
    weights = values(resumed.model)
    assert all(torch.equal(value, weights[name]) for name, value in values(straight.model).items())


@pytest.mark.parametrize("name", PAIR_RUNS)
def test_two_ranks_are_one_process_with_all_pairs(two_ranks: Path, one_rank: dict[str, Any], name: str) -> None:
    """Whether a rank has its pairs in one micro-batch or in two ("x2")."""
    alone, other = one_rank[name.rstrip("23x")].out_dir, two_ranks / name
    one, two = (read_log(path / "log.jsonl") for path in (alone, other))
    assert [r.loss for r in two] == pytest.approx([r.loss for r in one], abs=1e-6, rel=1e-6)
    assert [r.grad_norm for r in two] == pytest.approx([r.grad_norm for r in one], rel=1e-4)
    expected = load_file(alone / "trainable.safetensors")
    for name, value in load_file(other / "trainable.safetensors").items():
        assert (value - expected[name]).abs().max() < 1e-4, name


def test_a_tower_that_learns_is_not_matched_over_micro_batches(tmp_path: Path, photos: Path) -> None:
    rules = {"vision": 1e-3, "connector": 1e-3, "heads": 1e-3}
    with pytest.raises(ValueError, match=r"freeze vision, or set engine\.accumulation=1"):
        pair_run(
            tmp_path / "run", photos, "qformer", 2, 2, engine={"accumulation": 2}, changes={"trainable": rules}
        ).run()


def same_in_transformers(folder: Path, logits: torch.Tensor) -> None:
    """Load a folder with transformers and compare what it says of a text and a picture."""
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    model = llava()
    inputs = spoken(model, 0)
    patches, grid = inputs.images["patches"].view(28, 28, 3) / 255, inputs.images["grid"]
    assert grid == (4, 4)
    config = model.images.vision.config
    pixels = ((patches - torch.tensor(config.pixel_mean)) / torch.tensor(config.pixel_std)).permute(2, 0, 1)[None]
    with torch.no_grad():
        seen = theirs.eval()(input_ids=torch.tensor([[1, *[5] * 16, 10, 11, 12]]), pixel_values=pixels).logits[0]
        read = theirs(input_ids=torch.tensor([[1, 20, 21]])).logits[0]
    expected = torch.cat([seen, read])
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_what_is_saved_after_any_zero_stage_is_what_transformers_computes(tmp_path: Path, zero_stage: int) -> None:
    model = llava()
    before = values(model)
    rules = {"vision": 1e-2, "connector": 1e-2, "llm": 1e-2}
    trainer(
        tmp_path / "run", model, engine={"zero_stage": zero_stage}, changes={"steps": 2, "trainable": rules},
        batches=lambda index: spoken(model, index),
    ).run()  # fmt: skip
    assert not torch.equal(values(model)["images.connector.mlp.weight1"], before["images.connector.mlp.weight1"])
    model.save_pretrained(tmp_path / "folder")
    with torch.no_grad():
        same_in_transformers(tmp_path / "folder", model.logits(spoken(model, 0)))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_save_the_same(two_ranks: Path, zero_stage: int) -> None:
    same_in_transformers(two_ranks / f"folder{zero_stage}", torch.load(two_ranks / f"logits{zero_stage}.pt"))


def test_recomputed_roles_on_two_ranks_change_nothing(two_ranks: Path) -> None:
    assert losses(two_ranks / "again") == losses(two_ranks / "llava3")


def test_adapters_on_two_ranks_are_merged(two_ranks: Path) -> None:
    assert losses(two_ranks / "lora3") == pytest.approx(losses(two_ranks / "lora2"), abs=1e-6)
    plain, sharded = (load_file(two_ranks / f"lora{k}" / "trainable.safetensors") for k in (2, 3))
    assert plain.keys() == sharded.keys()
    assert all(torch.allclose(plain[name], sharded[name], atol=1e-5) for name in plain)
