"""Stages whose micro-batches are filled to a budget: shards, mixtures, ranks, workers, isolation, what is too large."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shard_recipe import recipe_of
from tiny_vlm import colour_photos, tiny_vlm

from fastmllm.config import ConfigError
from fastmllm.data.build import DataConfig, build
from fastmllm.data.images import load_image
from fastmllm.data.packing import Batch, collate
from fastmllm.data.rows import size_of
from fastmllm.infer.respond import template_of
from fastmllm.packed import tokens_an_image
from fastmllm.recipe import Recipe
from fastmllm.run import batches_of
from fastmllm.streamed import StreamedBatches
from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FASTMLLM_CACHE", str(tmp_path / "cache"))


def packed_recipe(folder: Path, workers: int = 0, tokens: int = 170) -> Recipe:
    recipe = recipe_of(folder, workers)
    stage = replace(recipe.stages[0], batch_size=1, max_tokens=tokens, max_images=3)
    return replace(recipe, stages=(stage,))


def check(batch: Batch, each: int, tokens: int) -> None:
    assert 0 < batch.input_ids.numel() <= tokens == batch.budget
    assert batch.num_visual_tokens <= 3 * each


def launched(monkeypatch, rank: int, ranks: int) -> None:
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))


def test_ranks_and_workers_change_nothing(tmp_path: Path, monkeypatch) -> None:
    model = tiny_vlm()
    made = {}
    for ranks, workers, accumulation in ((1, 0, 2), (2, 0, 1), (2, 2, 1)):
        found: dict[int, Batch] = {}
        for rank in range(ranks):
            launched(monkeypatch, rank, ranks)
            stage, engine = packed_recipe(tmp_path).stages[0], EngineConfig(accumulation=accumulation, workers=workers)
            batches = StreamedBatches(model, stage, engine, tmp_path / f"{ranks}-{workers}")
            found |= {index: batches(index) for index in range(rank, 12, ranks)}
            batches.loader.close()
        for index, batch in found.items():
            check(batch, tokens_an_image((1, 4), stage.seed, index), 170)
        made[ranks, workers] = [(found[i].ids, found[i].input_ids.tolist()) for i in range(12)]
    assert made[1, 0] == made[2, 0] == made[2, 2]
    assert len({len(ids) for ids, _ in made[1, 0]}) > 1  # as many as fit


def test_what_is_larger_than_the_budget_is_left_out_and_listed(tmp_path: Path) -> None:
    model = tiny_vlm()
    stage = packed_recipe(tmp_path, tokens=32).stages[0]
    batches = StreamedBatches(model, stage, EngineConfig(), tmp_path / "out")
    for index in range(3):
        check(batches(index), tokens_an_image((1, 4), stage.seed, index), 32)
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    large = [item for item in listed if item["reason"] == "larger than the budget"]
    assert large
    assert all("a micro-batch holds 32 and 3" in item["detail"] for item in large)
    assert {item["key"] for item in large} <= {str(i) for i in range(8)}


def test_samples_of_a_micro_batch_do_not_see_each_other(tmp_path: Path) -> None:
    model = tiny_vlm()
    stage = packed_recipe(tmp_path).stages[0]
    batches = StreamedBatches(model, stage, EngineConfig(), tmp_path / "out")
    stream = batches.loader.stream
    kinds = set()
    for index in range(4):
        drawn = stream(index)
        with torch.no_grad():
            together = model.log_probs(batches.loader.join(drawn))
            alone = [model.log_probs(batches.loader.join(replace(drawn, items=[item]))) for item in drawn.items]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
        kinds |= {len(item.images) for item in drawn.items}
    assert kinds == {0, 1, 2}


def test_a_mixture_is_packed_too(tmp_path: Path, monkeypatch) -> None:
    photos = colour_photos(tmp_path / "photos", count=2)
    found = build(DataConfig(path=str(photos), cache=str(tmp_path / "cache"))).train
    model = tiny_vlm()
    stage = StageConfig(name="s", steps=9, trainable={"connector.*": 1.0}, max_tokens=90, max_images=2)
    sizes = [size_of(s, model.tokenizer, template_of(model)) for task in found.values() for s in task]
    assert max(s.text + 4 * s.images for s in sizes) < 90
    one = batches_of(model, found, stage, EngineConfig(accumulation=2), tmp_path / "one")
    alone = [one(index) for index in range(8)]
    for batch in alone:
        check(batch, 4, 90)
    launched(monkeypatch, 0, 2)
    two = batches_of(model, found, stage, EngineConfig(), tmp_path / "two")
    assert [two(index).ids for index in (5, 2, 7)] == [alone[index].ids for index in (5, 2, 7)]
    assert (tmp_path / "two" / "packing-0.jsonl").is_file()
    short = replace(stage, max_tokens=max(s.text + 4 * s.images for s in sizes) - 1)
    few = batches_of(model, found, short, EngineConfig(), tmp_path / "short")
    for index in range(4):
        few(index)
    listed = [json.loads(line) for line in (tmp_path / "short" / "skipped.jsonl").read_text().splitlines()]
    assert {item["reason"] for item in listed} == {"larger than the budget"}


def test_an_image_that_several_samples_show_is_read_once(tmp_path: Path, monkeypatch) -> None:
    read: list[str] = []

    def counted(path: str, size: int) -> torch.Tensor:
        read.append(path)
        return load_image(path, size)

    for module in ("fastmllm.streamed", "fastmllm.data.packing"):
        monkeypatch.setattr(f"{module}.load_image", counted)
    stage = packed_recipe(tmp_path).stages[0]
    (pairs,) = (source for source in stage.sources if source.name == "pairs")
    stage = replace(stage, sources=(replace(pairs, weight=None),))
    batches = StreamedBatches(tiny_vlm(), stage, EngineConfig(), tmp_path / "out")
    batch = batches(0)
    assert (len(read), len(batch.image_paths)) == (1, 1)
    assert batch.shown is not None
    assert len(batch.shown) == 3
    batches(1)
    assert len(read) == 2  # nothing is kept from one micro-batch to the next
    read.clear()
    sample = batches.loader.stream.sources[0].read(0)
    made = collate([sample] * 3, tiny_vlm().tokenizer, num_visual_tokens=1, image_size=32, image_token_id=0)
    assert (len(read), len(made.ids)) == (1, 3)


def test_bad_budgets(tmp_path: Path) -> None:
    recipe_of(tmp_path)
    for changes in (["max_tokens=-1"], ["max_images=2"], ["max_tokens=9"], ["max_tokens=9", "batch_size=1"]):
        extra = ["stages.0.balance_steps=1"] if "batch_size=1" in changes else []
        with pytest.raises(ConfigError, match="max_tokens"):
            Recipe.load(tmp_path / "recipe.yaml", [*(f"stages.0.{change}" for change in changes), *extra])
