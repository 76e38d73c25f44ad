"""Stages of alignment through the recipe's own verbs: what is encoded, what is looked up, what goes on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_vlm import colour_photos, tiny_vlm

from fastmllm.alignment import correct, preferences
from fastmllm.config import ConfigError
from fastmllm.data.build import DataConfig, Splits, build
from fastmllm.data.sample import Sample
from fastmllm.recipe import Recipe
from fastmllm.run import cache_features, images_of, train_stage
from fastmllm.train.engine import EngineConfig
from fastmllm.train.grpo import GRPOConfig
from fastmllm.train.meters import read_log
from fastmllm.train.stages import StageConfig


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    root = tmp_path_factory.mktemp("align")
    return build(DataConfig(path=str(colour_photos(root / "photos", count=2)), cache=str(root / "cache")))


def stage(**changes: Any) -> StageConfig:
    values: dict[str, Any] = {"name": "align", "kind": "prefer", "steps": 4, "batch_size": 4, "schedule": "constant"}
    values |= {"trainable": {"connector.*": 3e-3, "language.*": 3e-3}, "mixture": {"name": 1, "yes_no": 1}}
    return StageConfig(**(values | changes))


def count_images(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    encode = model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    return seen


def run(model: Any, splits: Splits, out: Path, console: Console | None = None, **changes: Any) -> Any:
    console = console or Console(file=io.StringIO(), width=200)
    return train_stage(model, splits, stage(**changes), EngineConfig(), out, save_every=1, console=console)


def test_a_frozen_tower_encodes_each_image_once_for_all(splits, tmp_path, monkeypatch):
    """Chosen, rejected, reference and every step share one pass of the encoder."""
    model = tiny_vlm()
    seen = count_images(model, monkeypatch)
    cache_features(model, images_of(splits), None, Console(file=io.StringIO()))
    photos = sum(seen)
    assert photos == len(images_of(splits))
    run(model, splits, tmp_path)
    crops = len(list((tmp_path / "crops").glob("*.png")))
    assert 0 < sum(seen) - photos <= crops  # crops of the pairs that are drawn, and nothing else
    assert len(model.feature_cache.features) == sum(seen)


def test_a_learning_tower_encodes_an_image_once_a_step(splits, tmp_path, monkeypatch):
    model = tiny_vlm()
    model.config = model.config.__class__(image_size=32, visual_tokens=4, train_vision=True, dtype="float32")
    seen = count_images(model, monkeypatch)
    console = Console(file=io.StringIO())
    found = preferences(model, splits.train, {"name": 1.0}, stage(), EngineConfig(), tmp_path, console)
    seen.clear()
    batch = found.batches(0)
    model.log_probs(batch.batch)
    assert len(batch.ids) == 12
    assert seen == [8]  # four photographs and their crops, not twelve


def test_the_reference_is_the_start_and_is_computed_once(splits, tmp_path, monkeypatch):
    model = tiny_vlm()
    console = Console(file=io.StringIO())
    one = preferences(model, splits.train, {"name": 1.0}, stage(), EngineConfig(), tmp_path, console)
    batch = one.batches(2)
    with torch.no_grad():
        torch.testing.assert_close(model.log_probs(batch.batch), batch.reference, rtol=1e-5, atol=1e-5)
        monkeypatch.setattr(model, "log_probs", None)  # nothing is asked again
        two = preferences(model, splits.train, {"name": 1.0}, stage(), EngineConfig(), tmp_path, console)
        assert torch.equal(two.batches(2).reference, batch.reference)
        model.connector.norm.weight += 1
        with pytest.raises(TypeError):
            preferences(model, splits.train, {"name": 1.0}, stage(), EngineConfig(), tmp_path, console)


def test_a_stage_runs_resumes_and_is_reused(splits, tmp_path, monkeypatch):
    straight = tiny_vlm()
    run(straight, splits, tmp_path / "a")
    assert read_log(tmp_path / "a" / "align" / "log.jsonl")[0].targets == 4
    import fastmllm.train.trainer as trainer

    step = trainer.Trainer._step

    def stop(self, engine, number, *args):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, engine, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_vlm(), splits, tmp_path / "b")
    resumed = tiny_vlm()
    run(resumed, splits, tmp_path / "b")
    logs = [[r.loss for r in read_log(tmp_path / name / "align" / "log.jsonl")] for name in "ab"]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4
    for (name, one), two in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert run(tiny_vlm(), splits, tmp_path / "b").reused


def test_answers_are_judged_as_evaluation_judges_them():
    asked = Sample(id="a", prompt="?", answer="red", task="name", references=("crimson",))
    assert [correct(asked, text) for text in ("Red.", "a crimson", "blue", "", "red blue")] == [1, 1, 0, 0, 0]
    choice = Sample(id="b", prompt="?", answer="red", task="exists", choices=("red", "blue"))
    assert [correct(choice, text) for text in ("the red one", "blue", "red or blue")] == [1, 0, 0]


def test_a_model_that_half_knows_is_rewarded_into_knowing(splits, tmp_path):
    model = tiny_vlm()
    rules = {"connector.*": 1e-2, "language.*": 1e-2}
    changes = {"trainable": rules, "mixture": {"name": 1}}
    run(model, splits, tmp_path, name="instruct", kind="instruct", steps=20, batch_size=8, **changes)
    changes["trainable"] = {"connector.*": 3e-3, "language.*": 3e-3}
    grpo = GRPOConfig(group=8, max_new_tokens=4, kl=0.01)
    result = run(model, splits, tmp_path, name="grpo", kind="grpo", steps=24, batch_size=6, grpo=grpo, **changes)
    rewards = [record.reward for record in read_log(tmp_path / "grpo" / "log.jsonl")]
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.1, rewards
    assert result.steps == 24


def test_the_stages_of_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nstages:\n"
        "  - {name: dpo, kind: prefer, steps: 2, trainable: {connector.*: 1e-4}, prefer: {beta: 0.2, image: 0}}\n"
        "  - {name: rl, kind: grpo, steps: 2, trainable: {connector.*: 1e-4}, grpo: {group: 4, kl: 0.0}}\n"
    )
    stages = Recipe.load(path).stages
    assert (stages[0].prefer.beta, stages[0].prefer.image, stages[0].prefer.anchor) == (0.2, 0, 1.0)
    assert (stages[1].grpo.group, stages[1].grpo.kl, stages[1].grpo.inner) == (4, 0.0, 1)
    with pytest.raises(ConfigError, match="group"):
        Recipe.load(path, ["stages.1.grpo.group=1"])


def test_data_without_a_closed_set_is_refused(splits, tmp_path):
    lone = {"name": splits.train["name"][:1]}
    with pytest.raises(ValueError, match=r"stage 'align': no sample makes a pair \(1 no wrong answer in a closed set"):
        preferences(tiny_vlm(), lone, {}, stage(), EngineConfig(), tmp_path, Console(file=io.StringIO()))


def test_what_makes_no_pair_is_said(splits, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    lone = {"lone": [splits.train["name"][0]], **splits.train}
    found = preferences(tiny_vlm(), lone, {}, stage(mixture={}), EngineConfig(), tmp_path, console)
    assert found.skipped == {"no wrong answer in a closed set": [splits.train["name"][0].id]}
    assert "1 samples make no pair (no wrong answer in a closed set)" in console.file.getvalue()
