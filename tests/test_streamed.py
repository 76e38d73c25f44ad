"""A stage learns from shards: the same steps with and without workers and over an interruption; what is left out."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from shard_recipe import NOTHING, recipe_of
from tiny_vlm import tiny_vlm

from fastmllm.config import ConfigError
from fastmllm.data.loader import Loader
from fastmllm.data.token_shares import read_shares
from fastmllm.models.feature_store import image_key
from fastmllm.recipe import Recipe
from fastmllm.run import feature_store_of, train_stage
from fastmllm.streamed import StreamedBatches
from fastmllm.train.engine import EngineConfig


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
