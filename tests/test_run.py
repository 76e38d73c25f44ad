"""The whole way on a tiny model: photographs -> two stages -> evaluation -> sweep, resumed and reused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_vlm import colour_photos, tiny_vlm

import fastmllm
from fastmllm import demo, run, session
from fastmllm.config import ConfigError
from fastmllm.data.build import DataConfig, build
from fastmllm.eval.intervals import share
from fastmllm.eval.runner import Report, Row
from fastmllm.recipe import Recipe
from fastmllm.run import available, batches_of, cache_features, engine_for, images_of, questions_of, screen_splits
from fastmllm.train.checkpoint import CheckpointError
from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig

RECIPE = """
name: colours
model: {image_size: 32, visual_tokens: 4, dtype: float32}
stages:
  - {name: pretrain, steps: 20, batch_size: 12, trainable: {"connector.*": 1e-2}, mixture: {name: 1, group: 1}}
  - {name: instruct, steps: 200, batch_size: 12, trainable: {"connector.*": 1e-2, "language.*": 1e-2},
     mixture: {name: 2, yes_no: 1}, visual_tokens: [1, 4]}
eval: {gallery: 0, max_new_tokens: 6}
bench: {image_sizes: [16, 32], visual_tokens: [1, 4], limit: 8, repeats: 1, train_batch: 2}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the demo once on coloured squares."""
    pytest.importorskip("deepspeed")
    root = tmp_path_factory.mktemp("run")
    photos = colour_photos(root / "photos", count=8)
    path = root / "colours.yaml"
    path.write_text(RECIPE)
    questions = {str(i): {"question": "What is this?", "imageId": f"{i}", "answer": "red"} for i in range(3)}
    (root / "gqa" / "images").mkdir(parents=True)
    (root / "gqa" / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    for i in range(2):
        Image.new("RGB", (40, 30), "red").save(root / "gqa" / "images" / f"{i}.jpg")
    recipe = Recipe.load(path, [f"data.path={photos}", f"data.cache={root / 'cache'}", f"eval.sets.gqa={root / 'gqa'}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load_model", lambda config, seed, console: tiny_vlm(seed))
        metrics = demo.run_demo(recipe, root / "out", Console(file=(root / "log").open("w"), width=150))
        yield root, recipe, metrics


def test_it_learns_and_says_so(finished):
    root, _, metrics = finished
    rows = {
        (r["task"], r["condition"]): r["estimate"]["value"] for r in metrics["evaluation"] if r["metric"] != "yes ratio"
    }
    assert rows["name", "model"] >= 0.9
    assert rows["name", "blind"] <= 0.5
    assert rows["name", "wrong image"] <= 0.2
    assert metrics["beats_every_control"]["name"]
    assert metrics["stages"][1]["loss_last"] < 0.5 * metrics["stages"][0]["loss_first"]
    page = (root / "out" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "licences" in page.lower()
    log = (root / "log").read_text()
    assert "gqa: skipped 1: image missing" in log
    assert "gqa: 2 questions" in log
    assert next(r for r in metrics["evaluation"] if r["task"] == "gqa")["estimate"]["count"] == 2
    assert len(list((root / "out" / "answers").glob("gqa.*.0.jsonl"))) == 3  # model, blind, wrong image
    assert "about" in log
    assert "what learns" in log


def test_a_set_whose_file_changed_is_asked_again(finished):
    root, recipe, _ = finished
    out = root / "changed set"
    shutil.copytree(root / "out", out)
    path = root / "gqa" / "testdev_balanced_questions.json"
    before = path.read_text()
    try:
        path.write_text(before.replace("red", "blue"))
        changed = session.Session(recipe, out, Console(quiet=True))
        rows = {r.condition: r for r in changed.evaluate().rows if r.task == "gqa"}
        assert rows["majority"].estimate.value == 1.0
        assert "reused" not in changed.parts["evaluation"]
    finally:
        path.write_text(before)


def test_a_second_run_reuses_everything(finished):
    root, recipe, metrics = finished
    stamp = (root / "out" / "evaluation.json").stat().st_mtime_ns
    again = demo.run_demo(recipe, root / "out", Console(file=(root / "log2").open("w"), width=150))
    assert again["evaluation"] == metrics["evaluation"]
    assert again["sweep"] == metrics["sweep"]
    assert [s["reused"] for s in again["stages"]] == [True, True]
    # what was measured while a part was made stays with it
    first, second = ({k: v for k, v in m["seconds"].items() if k != "this run"} for m in (metrics, again))
    assert second == first
    assert again["peak_memory_gib"] == metrics["peak_memory_gib"]
    assert again["environment"] == metrics["environment"]
    assert metrics["reused"] == []
    assert set(again["reused"]) == set(first)
    assert (root / "out" / "evaluation.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("change", ["model.compress=bipartite_merge", "model.visual_tokens=1"])
def test_a_changed_model_setting_reuses_nothing(finished, change, tmp_path):
    root, recipe, _ = finished
    key, _, value = change.removeprefix("model.").partition("=")
    shutil.copytree(root / "out", tmp_path / "out")
    changed = replace(recipe, model=replace(recipe.model, **{key: int(value) if value.isdigit() else value}))
    console = Console(file=(tmp_path / "log").open("w"), width=150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load_model", lambda config, seed, console: tiny_vlm(seed, config))
        changed_run = session.Session(changed, tmp_path / "out", console)
        assert [r.reused for r in changed_run.train()] == [False, False]
        changed_run.evaluate()
    assert "reused" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.image_size=30", r"model\.image_size: 30 px is not a multiple of 8"),
        ("model.visual_tokens=17", r"model\.visual_tokens: pool: keep 17 must lie in 1\.\.16"),
        ("stages.1.visual_tokens=[7]", r"stage 'instruct': visual_tokens: pool: 7 tokens"),
        ("bench.image_sizes=[20]", r"bench\.image_sizes: 20 px"),
        ('stages.1.trainable={"conector.*": 1.0}', r"rule 'conector\.\*' matches no parameter; near names: connector"),
    ],
)
def test_what_does_not_fit_is_said_before_the_long_work(tmp_path, change, message):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    recipe = Recipe.load(path, [change])
    with pytest.raises(ValueError, match=message):
        session.check_recipe(recipe, tiny_vlm(config=recipe.model))


def test_the_precision_and_the_ranks_are_recorded(finished):
    root, recipe, metrics = finished
    assert (metrics["precision"], metrics["ranks"]) == ("float32", 1)
    assert "float32 (model.dtype: float32)" in (root / "out" / "report.html").read_text()
    engine = replace(recipe.engine, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"engine\.dtype is bfloat16, but model\.dtype=float32 means float32"):
        engine_for(recipe.model, engine)
    assert engine_for(replace(recipe.model, dtype="bfloat16"), recipe.engine).dtype == "bfloat16"


def test_a_report_is_about_its_own_data(finished):
    root, _, _ = finished
    page = (root / "out" / "report.html").read_text()
    assert "<h1>fastmllm: 4 classes of photographs in photos</h1>" in page
    assert "Encoders on the same budget" not in page  # a stored table, of the shipped recipe
    source, rows = demo._candidates(Recipe.load("recipes/emoji.yaml"))
    assert len(rows) == 3
    assert "benchmarks/results/cpu/encoders.json" in source
    assert "threads" in source


def test_the_chart_shows_shares_only(finished, monkeypatch):
    root, recipe, _ = finished
    shown = []
    monkeypatch.setattr(demo, "render", lambda page: shown.append(page) or "")
    run = demo.run_demo(recipe, root / "out", Console(file=(root / "log5").open("w"), width=150))
    scene = Report(
        rows=[Row("scene", "model", "CIDEr-D", share([True])), Row("name", "model", "accuracy", share([True]))]
    )
    assert shown[0].chart_tasks == ["name", "exists", "yes_no", "gqa"]
    assert demo.charted(scene) == ["name"]
    assert run["evaluation"]


def test_the_announcement_follows_the_recipe():
    shipped = Recipe.load("recipes/emoji.yaml", ["model.dtype=bfloat16"])
    whole = demo.expected_seconds(shipped)
    short = demo.expected_seconds(
        Recipe.load("recipes/emoji.yaml", ["stages.0.steps=75", "stages.1.steps=75", "model.dtype=bfloat16"])
    )
    assert short["training"] == pytest.approx(whole["training"] / 2)
    assert short["sweep"] == whole["sweep"]
    cells = demo.expected_seconds(Recipe.load("recipes/emoji.yaml", ["bench.image_sizes=[160]", "eval.limit=30"]))
    assert cells["sweep"] < 0.5 * demo.expected_seconds(Recipe.load("recipes/emoji.yaml"))["sweep"]
    assert cells["evaluation"] < 0.5 * demo.expected_seconds(Recipe.load("recipes/emoji.yaml"))["evaluation"]
    slow = demo.expected_seconds(Recipe.load("recipes/emoji.yaml", ["model.dtype=float32"]))
    assert slow["training"] == pytest.approx(demo.EXPECTED_S["training"] * demo.WITHOUT_BFLOAT16)
    assert slow["data"] == whole["data"]


def test_other_ranks_only_train(finished, monkeypatch, tmp_path):
    _, recipe, _ = finished
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(session.Session, "train", lambda self: [])
    monkeypatch.setattr(session, "load_model", lambda config, seed, console: tiny_vlm(seed))
    assert demo.run_demo(recipe, tmp_path / "out") == {}
    assert not (tmp_path / "out").exists()


def test_a_question_needs_its_image_and_a_finished_run(finished, monkeypatch, tmp_path):
    root, recipe, _ = finished
    image = next((root / "photos").rglob("*.png"))
    monkeypatch.setattr(session, "load_model", lambda config, seed, console: tiny_vlm(seed, config))
    console = Console(file=(tmp_path / "log").open("w"))
    with pytest.raises(ValueError, match=r"gone\.png: no such image"):
        session.Session(recipe, tmp_path / "out", console).ask("gone.png", "What is this?")
    with pytest.raises(ValueError, match="no finished run, stage 'pretrain' is missing"):
        session.Session(recipe, tmp_path / "out", console).ask(str(image), "What is this?")
    assert not (tmp_path / "out").exists()
    assert session.Session(recipe, root / "out", console).ask(str(image), "What is this?")
    other = replace(recipe, model=replace(recipe.model, compress="bipartite_merge"))
    with pytest.raises(CheckpointError, match="holds a run of another recipe"):
        session.Session(other, root / "out", console).ask(str(image), "What is this?")
    monkeypatch.setattr(fastmllm, "__version__", "99")  # other code may give other weights
    with pytest.raises(CheckpointError, match=r"given\.version: .* -> 99"):
        session.Session(recipe, root / "out", console).ask(str(image), "What is this?")


def test_the_sweep_has_every_cell(finished):
    _, _, metrics = finished
    cells = {(c["image_size"], c["visual_tokens"], c["method"]) for c in metrics["sweep"]}
    assert cells == {
        (16, 1, "pool"), (16, 1, "bipartite_merge"), (16, 4, "none"),
        (32, 1, "pool"), (32, 1, "bipartite_merge"), (32, 4, "pool"), (32, 4, "bipartite_merge"),
    }  # fmt: skip
    assert all(c["gflops"] > 0 and c["peak_mib"] > 0 and c["prefill_ms"] > 0 for c in metrics["sweep"])


def test_a_damaged_store_is_made_again(finished):
    root, recipe, metrics = finished
    (root / "out" / "evaluation.json").write_text("{")
    again = demo.run_demo(recipe, root / "out", Console(file=(root / "log3").open("w"), width=150))
    assert again["evaluation"] == metrics["evaluation"]
    assert "is damaged and made again" in (root / "log3").read_text()


def test_batches_are_a_function_of_their_index(tmp_path):
    splits = build(DataConfig(path=str(colour_photos(tmp_path / "photos", count=2)), cache=str(tmp_path / "cache")))
    model = tiny_vlm()
    stage = StageConfig(name="s", steps=5, batch_size=3, trainable={"connector.*": 1.0}, visual_tokens=(1, 4, 16))
    cache_features(model, images_of(splits), tmp_path, Console(file=(tmp_path / "log").open("w")))
    one, two = (batches_of(model, splits.train, stage, EngineConfig(), tmp_path) for _ in range(2))
    counts = set()
    for index in (3, 0, 7, 5, 1):
        a, b = one(index), two(index)
        assert a.ids == b.ids
        assert torch.equal(a.input_ids, b.input_ids)
        assert a.pixels is None  # features are kept
        counts.add(a.image_index.numel() // max(len(a.image_paths), 1))
    assert len(counts) > 1


def test_the_reuse_key_knows_the_truth(tmp_path):
    splits = build(DataConfig(path=str(colour_photos(tmp_path / "photos", count=1)), cache=str(tmp_path / "cache")))
    sample = splits.eval["name"][0]
    other = replace(sample, truth={**sample.truth, "objects": ["another"]})  # CHAIR reads it
    assert questions_of({"name": [sample]}) != questions_of({"name": [other]})


def test_what_cannot_be_learned_is_left_out_and_counted(tmp_path):
    splits = build(DataConfig(path=str(colour_photos(tmp_path / "photos", count=2)), cache=str(tmp_path / "cache")))
    good = splits.train["name"][0]
    bad = [replace(good, answer=" "), replace(good, answer="<|im_end|>"), replace(good, task="caption", image=None)]
    splits = replace(splits, train={"name": [good, *bad]})
    screened = screen_splits(tiny_vlm(), splits)
    assert screened.train == {"name": [good]}
    assert screened.skipped == {"empty answer": 1, "special token": 1, "caption without an image": 1}


def test_a_mixture_must_make_sense():
    stage = StageConfig(name="s", steps=1, trainable={"a": 1.0}, mixture={"name": 1.0, "group": 2.0})
    assert available(stage, {"name": [object()]}) == {"name": 1.0}
    with pytest.raises(ValueError, match="this data has none of name, group"):
        available(stage, {"yes_no": [object()]})
    wrong = StageConfig(name="s", steps=1, trainable={"a": 1.0}, mixture={"nmae": 1.0})
    with pytest.raises(ValueError, match=r"mixture names \['nmae'\], no such task; known: name"):
        available(wrong, {})


def test_recipe_errors_name_the_key(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    with pytest.raises(ConfigError, match=r"r\.yaml\.model\.image_sise: unknown key; did you mean 'image_size'"):
        Recipe.load(path, ["model.image_sise=3"])
    with pytest.raises(ConfigError, match="stages need distinct names"):
        Recipe.load(path, ["stages.1.name=pretrain"])


def test_stored_metrics_are_json(finished):
    root, _, _ = finished
    assert json.loads((root / "out" / "metrics.json").read_text())["name"] == "colours"


def test_a_stage_has_its_own_roles_resolution_and_engine(tmp_path):
    splits = build(DataConfig(path=str(colour_photos(tmp_path / "photos", count=2)), cache=str(tmp_path / "cache")))
    model, seen = tiny_vlm(), []
    cache_features(model, images_of(splits))
    stage = StageConfig(name="first", steps=1, batch_size=2, trainable={"connector": 1e-2}, visual_tokens=(1,))
    tower = replace(stage, name="tower", trainable={"vision": 1e-2}, image_size=16, zero_stage=3)
    model.vision.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[1:3])))
    before = model.vision.blocks[0].attn.qkv.weight.clone()
    run.train_stage(model, splits, stage, EngineConfig(zero_stage=1), tmp_path)
    assert not seen  # features come from the cache
    assert torch.equal(model.vision.blocks[0].attn.qkv.weight, before)
    run.train_stage(model, splits, tower, EngineConfig(zero_stage=1), tmp_path)
    assert seen == [(16, 16)]
    assert model.feature_cache is None  # it is of another encoder now
    assert not torch.equal(model.vision.blocks[0].attn.qkv.weight, before)
    layouts = [json.loads(next((tmp_path / name).glob("checkpoints/*/meta.json")).read_text())["layout"]["zero_stage"]
               for name in ("first", "tower")]  # fmt: skip
    assert layouts == [1, 3]
    with pytest.raises(ValueError, match="stage 'tower': image_size: 20 px is not a multiple of 8"):
        session.check_recipe(Recipe(name="r", stages=(replace(tower, image_size=20),), model=model.config), model)
    with pytest.raises(ValueError, match="stage 'tower': visual_tokens"):
        session.check_recipe(Recipe(name="r", stages=(replace(tower, visual_tokens=(16,)),), model=model.config), model)
