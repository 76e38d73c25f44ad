"""Stages whose micro-batches are filled to a budget: shards, mixtures, ranks, workers, isolation, what is too large."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shard_recipe import recipe_of
from tiny_talk import listed, talking, talks
from tiny_vlm import colour_photos, tiny_vlm

from fastmllm.config import ConfigError
from fastmllm.data.build import DataConfig, build
from fastmllm.data.images import load_image
from fastmllm.data.packing import Batch, collate
from fastmllm.data.rows import size_of
from fastmllm.data.sample import Conversation
from fastmllm.data.stream import Drawn, Stream
from fastmllm.infer.respond import template_of
from fastmllm.packed import tokens_an_image
from fastmllm.recipe import Recipe
from fastmllm.run import batches_of
from fastmllm.streamed import StreamedBatches
from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig
from fastmllm.train.step_meter import batch_contents


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


PARTS = [
    ("qwen", "native", "merger", "deepstack"),
    ("vit", "anyres", "mlp", "tokens"),
    ("vit", "tiles", "mlp", "mllama"),
]


def of_talks(folder: Path, tokens: int = 240) -> StageConfig:
    made = StageConfig(name="s", steps=9, trainable={"connector": 1.0}, max_tokens=tokens, max_images=3)
    return replace(made, sources=(talks(folder),))


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_a_composition_fills_its_budget_with_pictures_of_any_size(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """Its rows are those that were planned from headers; no sample sees another; what does not fit is listed."""
    model = talking(*parts)
    stage = of_talks(tmp_path)
    batches = StreamedBatches(model, stage, EngineConfig(), tmp_path / "out")
    stream, kinds, filled = batches.loader.stream, set(), []
    assert stream.packing is not None
    for index in range(4):
        drawn = stream(index)
        batch = batches(index)
        assert 0 < batch.num_tokens <= stage.max_tokens == batch.budget
        assert batch_contents(batch)[-1] == stage.max_tokens  # what `unfilled` is a share of
        alone = [batches.loader.join(replace(drawn, items=[item])) for item in drawn.items]
        with torch.no_grad():
            together, apart = model.log_probs(batch), torch.cat([model.log_probs(one) for one in alone])
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
        lengths = {item.id: one.num_tokens for item, one in zip(drawn.items, alone, strict=True)}
        planned = [stream.packing.size_of(sample) for sample in samples_of(stream, drawn)]
        assert [lengths[item.id] for item in drawn.items] == [size.text for size in planned]
        assert sum(size.images for size in planned) <= 3
        kinds |= {len(item.paths) for item in drawn.items}
        filled.append(len(planned))
    assert kinds == {0, 1, 2}
    assert max(filled) > 2  # as many as fit
    for index in range(4, 16):
        batches(index)
    found = listed(tmp_path / "out")
    assert found["7"][0] == "undecodable image"
    narrow = "aspect ratio" if parts[1] == "native" else "too narrow"
    assert parts[1] == "tiles" or (found["10"][0] == "undecodable image" and narrow in found["10"][1])


def samples_of(stream: Stream, drawn: Drawn) -> list[Conversation]:
    """Return the samples of the items that were not left out."""
    kept = {item.id for item in drawn.items}
    found = [stream.sources[0].read(draw) for draw in drawn.filled.draws]
    return [sample for sample in found if isinstance(sample, Conversation) and sample.id in kept]


def test_a_composition_is_packed_alike_by_ranks_and_workers(tmp_path: Path, monkeypatch) -> None:
    model, stage, made = talking(*PARTS[0]), of_talks(tmp_path), {}
    for ranks, workers, accumulation in ((1, 0, 2), (2, 2, 1)):
        found = {}
        for rank in range(ranks):
            launched(monkeypatch, rank, ranks)
            engine = EngineConfig(accumulation=accumulation, workers=workers)
            batches = StreamedBatches(model, stage, engine, tmp_path / f"{ranks}-{workers}")
            found |= {index: batches(index) for index in range(rank, 8, ranks)}
            batches.loader.close()
        made[ranks] = [(found[i].ids, found[i].input_ids.tolist(), found[i].counts) for i in range(8)]
    assert made[1] == made[2]


def test_a_mixture_of_a_composition_is_packed_too(tmp_path: Path) -> None:
    photos = colour_photos(tmp_path / "photos", count=2)
    found = build(DataConfig(path=str(photos), cache=str(tmp_path / "cache"))).train
    model = talking(*PARTS[0])
    stage = StageConfig(name="s", steps=9, trainable={"connector": 1.0}, max_tokens=150, max_images=2)
    batches = batches_of(model, found, stage, EngineConfig(), tmp_path / "out")
    for index in range(4):
        batch = batches(index)
        assert 0 < batch.num_tokens <= 150 == batch.budget
        assert len(batch.counts) <= 2
    (photos / "train" / "red" / "0.png").write_bytes(b"no image")
    broken = batches_of(model, found, replace(stage, seed=3), EngineConfig(), tmp_path / "broken")
    for index in range(16):
        broken(index)
    reasons = {reason for reason, _ in listed(tmp_path / "broken").values()}
    assert reasons == {"undecodable image"}


def test_bad_budgets(tmp_path: Path) -> None:
    recipe_of(tmp_path)
    for changes in (["max_tokens=-1"], ["max_images=2"], ["max_tokens=9"], ["max_tokens=9", "batch_size=1"]):
        extra = ["stages.0.balance_steps=1"] if "batch_size=1" in changes else []
        with pytest.raises(ConfigError, match="max_tokens"):
            Recipe.load(tmp_path / "recipe.yaml", [*(f"stages.0.{change}" for change in changes), *extra])
