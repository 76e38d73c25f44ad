"""A stage learns from shards: the same steps with and without workers and over an interruption; what is left out."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from shard_recipe import NOTHING, recipe_of
from tiny_shards import png, talk, write_tar
from tiny_talk import SIZES, talking, talks
from tiny_vlm import tiny_vlm

from fastmllm.config import ConfigError
from fastmllm.data.loader import Loader
from fastmllm.data.shards import SourceConfig
from fastmllm.data.token_shares import read_shares
from fastmllm.models.feature_store import image_key
from fastmllm.models.mllm import MLLM
from fastmllm.recipe import Recipe
from fastmllm.run import feature_store_of, train_stage
from fastmllm.streamed import StreamedBatches
from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FASTMLLM_CACHE", str(tmp_path / "cache"))


def train(recipe: Recipe, out: Path, console: Console | None = None) -> list[float]:
    model = tiny_vlm()
    train_stage(model, NOTHING, recipe.stages[0], recipe.engine, out, save_every=2, console=console)
    return [json.loads(line)["loss"] for line in (out / "instruct" / "log.jsonl").read_text().splitlines()]


def test_interrupted_or_not_it_learns_the_same(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("deepspeed")
    told = io.StringIO()
    whole = train(recipe_of(tmp_path, window=2), tmp_path / "whole", Console(file=told, width=300))
    assert "instruct: left out of the sources: 1 x missing file; see" in told.getvalue()
    recipe, at = recipe_of(tmp_path, workers=1, window=2), Loader.at

    def killed(self: Loader, index: int) -> object:
        if index == 3:
            raise KeyboardInterrupt
        return at(self, index)

    monkeypatch.setattr(Loader, "at", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "out")
    monkeypatch.setattr(Loader, "at", at)
    assert train(recipe_of(tmp_path, window=2), tmp_path / "out") == whole
    assert len(whole) == 4
    listed = [json.loads(line) for line in (tmp_path / "whole" / "instruct" / "skipped.jsonl").read_text().splitlines()]
    reasons = {(item["key"], item["reason"]) for item in listed}
    assert reasons == {("1", "missing file"), ("5", "undecodable image")}
    assert all(item["shard"].startswith(str(tmp_path)) for item in listed)
    shares = read_shares(tmp_path / "whole" / "instruct")
    assert shares == read_shares(tmp_path / "out" / "instruct")  # what was done again counts once
    assert sum(share.samples for share in shares.values()) + len(listed) - 1 == 4 * 3  # one was left out at once
    assert shares["talks"].samples > shares["pairs"].samples > 0
    assert shares["talks"].targets * shares["pairs"].samples > shares["pairs"].targets * shares["talks"].samples


def test_a_batch_without_targets_costs_nothing_and_is_computed(tmp_path: Path) -> None:
    model = tiny_vlm().train()
    recipe = recipe_of(tmp_path)
    stage = recipe.stages[0]
    engine = EngineConfig(accumulation=2)
    batches = StreamedBatches(model, stage, engine, tmp_path / "out")
    stream = batches.loader.stream
    drawn = replace(stream(0), scored=False)
    blank = batches.loader.join(drawn)
    assert (blank.num_targets, len(blank.ids)) == (0, 3)
    loss = model(blank)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())
    scored = batches.loader.join(stream(0))
    assert scored.num_targets > 0
    assert torch.equal(scored.input_ids, blank.input_ids)
    assert batches(0).ids == scored.ids


def test_features_of_streamed_images_are_kept(tmp_path: Path, monkeypatch) -> None:
    """The encoder runs once for each image, in batches that hold new and known ones; losses stay."""
    stage, engine = replace(recipe_of(tmp_path).stages[0], batch_size=2), EngineConfig(feature_cache_gib=1.0)
    plain, model = tiny_vlm(), tiny_vlm()
    plain.train().requires_grad_(False)
    model.train().requires_grad_(False)
    assert feature_store_of(model, stage, EngineConfig()) is None
    model.feature_store = feature_store_of(model, stage, engine)
    seen: list[int] = []  # without the black picture of a batch that has none
    model.vision.register_forward_pre_hook(lambda _, inputs: seen.extend(1 for image in inputs[0] if image.any()))
    batches = StreamedBatches(model, stage, engine, tmp_path / "out")
    expected = StreamedBatches(plain, stage, engine, tmp_path / "plain")
    partly, images, twice = 0, set(), 0
    for index in range(8):
        batch, whole = batches(index), expected(index)
        partly += batch.pixels is not None and batch.features is not None
        torch.testing.assert_close(model(batch), plain(whole))
        keys = [image_key(path) for path in whole.image_paths]
        twice += len(keys) - len(set(keys))  # the same bytes in two places of a batch
        images |= set(keys)
    assert partly
    assert len(images) <= len(seen) <= len(images) + twice
    before = len(seen)
    batches.loader.close()
    torch.testing.assert_close(model(batches(0)), plain(expected(0)))
    assert len(seen) == before
    model.vision.requires_grad_(True)
    assert feature_store_of(model, stage, engine) is None


def other_weights(model: MLLM) -> None:
    with torch.no_grad():
        next(model.images.towers()[-1].parameters()).add_(0.1)


def other_policy(model: MLLM) -> None:
    assert model.packing is not None
    model.packing = replace(model.packing, policy=replace(model.packing.policy, resample="lanczos"))


@pytest.mark.parametrize(
    ("parts", "change"),
    [(("vit", "anyres", "mlp", "tokens"), other_policy), (("vit", "dual", "mlp", "cogagent"), other_weights)],
    ids=["tiles", "dual"],
)
def test_a_composition_learns_the_same_from_kept_features(
    tmp_path: Path, parts: tuple[str, ...], change: Callable[[MLLM], None]
) -> None:
    """A stage with shards and a budget: encoded once, then never; any key that is another one encodes again."""
    pytest.importorskip("deepspeed")
    stage = StageConfig(name="instruct", steps=2, trainable={"connector": 1e-2}, max_tokens=260, max_images=3)
    stage = replace(stage, sources=(talks(tmp_path),))
    seen: list[int] = []

    def run(name: str, gib: float, change: Callable[[MLLM], None] = lambda model: None) -> list[float]:
        model, out = talking(*parts), tmp_path / name
        change(model)
        seen.clear()
        model.images.vision.blocks[0].register_forward_hook(lambda *_: seen.append(1))
        train_stage(model, NOTHING, stage, EngineConfig(zero_stage=1, feature_cache_gib=gib, workers=int(gib > 1)), out)
        assert model.feature_store is None
        lines = [json.loads(line) for line in (out / "instruct" / "log.jsonl").read_text().splitlines()]
        assert all(0 <= line["unfilled"] < 1 and line["padding"] == 0 for line in lines)
        return [line["loss"] for line in lines]

    plain = run("plain", 0.0)
    every = len(seen)
    assert run("cold", 1.0) == pytest.approx(plain, rel=1e-5)
    assert 0 < len(seen) <= every
    assert run("warm", 2.0) == pytest.approx(plain, rel=1e-5)
    assert not seen
    files = len(list((tmp_path / "cache").rglob("*.features")))

    run("changed", 1.0, change)
    assert seen
    assert len(list((tmp_path / "cache").rglob("*.features"))) > files
    learning = talking(*parts)
    learning.images.towers()[-1].requires_grad_(True)
    assert feature_store_of(learning, stage, EngineConfig(feature_cache_gib=1.0)) is None


@pytest.mark.parametrize(("images", "steps"), [(True, 6), (False, 2)])
def test_what_learns_shows_at_the_first_step_with_an_image(tmp_path: Path, images: bool, steps: int) -> None:
    pytest.importorskip("deepspeed")
    texts = [(f"{i}.json", talk("What is this?", "red", images=0)) for i in range(8)]
    seen = [("8.json", talk("What is this?", "red", images=1)), ("8.png", png(20, (24, 16)))]
    write_tar(tmp_path / "texts.tar", texts)
    write_tar(tmp_path / "seen.tar", seen)
    sources = [SourceConfig(name="texts", path=str(tmp_path / "texts.tar"), weight=0.9)]
    if images:
        sources.append(SourceConfig(name="seen", path=str(tmp_path / "seen.tar"), weight=0.1))
    model = talking("vit", "fixed", "mlp", "tokens")
    for seed in range(4):
        stage, out = StageConfig(name="s", steps=steps, trainable={"connector": 1e-2}, seed=seed), tmp_path / str(seed)
        stage = replace(stage, batch_size=1, sources=tuple(sources))
        if not images:
            with pytest.raises(RuntimeError, match="all-zero gradient"):
                train_stage(model, NOTHING, stage, EngineConfig(zero_stage=1), out)
            return
        train_stage(model, NOTHING, stage, EngineConfig(zero_stage=1), out)
        lines = [json.loads(line) for line in (out / "s" / "log.jsonl").read_text().splitlines()]
        if lines[0]["visual_tokens"] == 0 and any(line["visual_tokens"] for line in lines):
            return  # its first step had no image, and a later one had
    pytest.fail("no seed begins with a text")


@pytest.mark.parametrize("parts", [("qwen", "native", "merger", "tokens"), ("vit", "tiles", "mlp", "tokens")])
def test_ranks_share_out_a_compositions_patches(tmp_path: Path, parts: tuple[str, ...]) -> None:
    model = talking(*parts)
    stage = StageConfig(name="s", steps=4, trainable={"connector": 1e-2}, batch_size=1, sources=(talks(tmp_path),))
    stage = replace(stage, balance_steps=2)
    stream = StreamedBatches(model, stage, EngineConfig(accumulation=2), tmp_path / "out").loader.stream
    assert stream.cost is not None
    for size in SIZES:
        images = model.pack([[np.zeros((*size[::-1], 3), np.uint8)]]).images
        assert images is not None
        assert stream.cost((size,)) == sum(model.images.units(images))
    assert len({stream.cost((size,)) for size in SIZES}) > 1
    assert stream.cost((SIZES[0], SIZES[1])) == stream.cost((SIZES[0],)) + stream.cost((SIZES[1],))
    assert stream.cost(((4, 1000),)) == 0 or parts[1] == "tiles"


def test_a_frozen_tower_runs_in_sub_batches_without_graph(monkeypatch) -> None:
    monkeypatch.setattr("fastmllm.models.vlm.ENCODED_TOGETHER", 3)
    model, pixels = tiny_vlm().train(), torch.randint(0, 255, (8, 32, 32, 3), dtype=torch.uint8)
    sizes: list[int] = []
    model.vision.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    whole = model.encode_images(pixels)
    assert sizes == [8]  # what learns is not taken apart: every rank calls it once
    model.vision.requires_grad_(False)
    parts = model.encode_images(pixels)
    assert sizes[1:] == [3, 3, 2]
    assert not parts.requires_grad
    torch.testing.assert_close(parts, whole.detach())
    for param in model.vision.parameters():
        param.ds_id = 0  # as under ZeRO-3
    model.encode_images(pixels)
    assert sizes[4:] == [8]


def test_bad_stages(tmp_path: Path) -> None:
    recipe_of(tmp_path)
    path = tmp_path / "recipe.yaml"
    for change, message in (
        ("stages.0.mixture={name: 1}", "take the place of a mixture"),
        ("stages.0.sources=[]", "balance_steps"),
        ("stages.0.balance_steps=-1", "balance_steps"),
        ("engine.workers=-1", "workers is -1"),
        ("engine.feature_cache_gib=-1", "feature_cache_gib -1"),
        ("stages.0.sources.0.weight=0", "weight must be above 0"),
        ("stages.0.sources.0.paht=x", "paht"),
    ):
        with pytest.raises(ConfigError, match=message):
            Recipe.load(path, [change, *(["stages.0.balance_steps=1"] if "sources=[]" in change else [])])


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a Flamingo at ZeRO-3 from a tar of texts, images and videos: on one rank, on two, and killed on two."""
    out = tmp_path_factory.mktemp("composed")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = (HERE.parent, HERE / "train", HERE / "support")
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "FASTMLLM_CACHE": str(out / "cache")}
    command = [sys.executable, str(HERE / "train" / "composed_worker.py"), str(out)]
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return out


def steps(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "composed" / "log.jsonl").read_text().splitlines()]


def test_texts_images_and_videos_through_a_composition(composed: Path) -> None:
    """Two ranks learn what one does, whichever of them sees images; a torn one is left out and listed."""
    one, two = steps(composed / "one"), steps(composed / "two")
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], abs=2e-6)
    assert [step["grad_norm"] for step in two] == pytest.approx([step["grad_norm"] for step in one], rel=1e-4)
    visual = [step["visual_tokens"] for step in two]
    assert visual == [step["visual_tokens"] for step in one]
    assert len(two) == 4
    assert len(set(visual)) > 1
    listed = [json.loads(item) for path in composed.glob("two/composed/skipped*.jsonl") for item in path.open()]
    assert {(item["key"], item["reason"]) for item in listed} == {("4", "undecodable image")}


def test_a_composition_killed_and_run_again_is_the_same_to_the_bit(composed: Path) -> None:
    for first, second in zip(steps(composed / "two"), steps(composed / "cut"), strict=True):
        assert (first["loss"], first["grad_norm"]) == (second["loss"], second["grad_norm"])
    expected = load_file(composed / "two" / "composed" / "trainable.safetensors")
    for name, value in load_file(composed / "cut" / "composed" / "trainable.safetensors").items():
        assert torch.equal(value, expected[name]), name
