from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny_compositions import tiny

from fastmllm import cli
from fastmllm.models.compose import compose
from fastmllm.models.composition import from_json
from fastmllm.models.mllm import MLLM
from fastmllm.models.shapes import talk_shape
from fastmllm.models.talk import TalkConfig
from fastmllm.plan_table import notes, show
from fastmllm.recipe import Recipe
from fastmllm.train.devices import DEVICES
from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig
from fastmllm.training_plan import Assumptions, plan_training, samples_of

RECIPE = """
name: two stages
model: {vision: vit_tiny, image_size: 64, visual_tokens: 4}
stages:
  - {name: pretrain, steps: 1, batch_size: 2, trainable: {connector: 1e-3}}
  - {name: instruct, steps: 1, batch_size: 1, zero_stage: 3,
     trainable: {connector: 1e-5, llm: {lr: 1e-5, checkpointing: true}}}
engine: {zero_stage: 2, accumulation: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return Recipe.load(tmp_path / "recipe.yaml")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that has a config.json, and no weights."""
    folder = tmp_path_factory.mktemp("model")
    compose(tiny("vit", "fixed", "mlp", "tokens")).save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return str(folder)


def test_a_composition_is_planned_from_the_recipe() -> None:
    """Its parameters are those of the composed model; a budget says how many samples fit, by its resolution policy."""
    file = Path(__file__).parents[1] / "recipes" / "cross_attention.yaml"
    recipe = Recipe.load(file, ["stages.1.batch_size=1", "stages.1.max_tokens=2048", "stages.1.max_images=3"])
    config = recipe.model
    assert isinstance(config, TalkConfig)
    plan = plan_training(recipe, 2)
    made = MLLM.from_config(from_json(config.composition, "here"))
    assert plan.model == "the composition of a small Flamingo"
    assert {stage.parameters for stage in plan.stages} == {sum(p.numel() for p in made.parameters())}
    roles, sizes = made.roles(), {name: p.numel() for name, p in made.named_parameters()}
    first = sum(sizes[name] for role in ("connector", "cross_attention") for name in roles[role])
    assert plan.stages[0].trainable == first
    tokens = [stage.step.tokens for stage in plan.stages[:2]]
    assert tokens == [8 * 257, 3 * 257]  # a picture stands in the text as one token
    parts = {"vision": "vit_tiny", "language": "smollm2-135m-instruct"}
    left = {key: value for key, value in config.composition.items() if key not in ("encoder", "language")}
    filled = talk_shape(replace(config, composition=left | {"fusion": "tokens"}, **parts))
    assert filled.device.type == "meta"
    assert (filled.images.vision.config.width, filled.language.config.depth) == (192, 30)


def test_a_70b_recipe_is_planned_in_seconds(recipe: Recipe) -> None:
    began = time.process_time()
    (stage,) = plan_training(replace(recipe, stages=recipe.stages[1:]), 256, model="qwen2-vl-72b").stages
    assert time.process_time() - began < 60
    assert stage.trainable > 0.9 * stage.parameters
    assert stage.state.parameters < 2 * stage.parameters / 200
    assert stage.smallest == 3
    # 3 passes over the language model's weights, and one more over its layers
    assert stage.step.flops == pytest.approx(8 * stage.trainable * stage.step.tokens, rel=0.1)
    assert stage.compute_s == pytest.approx(2 * stage.step.flops / (0.4 * 989.4e12))  # two micro-batches
    # of 2 bytes: gathered forward and backward in each micro-batch, gradients reduced as often
    sent = 2 * 2 * (2 * stage.parameters + stage.trainable) * 255 / 256
    assert stage.near + stage.far == pytest.approx(sent, rel=0.03)
    assert stage.samples_per_s[0] > stage.samples_per_s[1] > 0


def test_what_the_plan_says_is_printed(recipe: Recipe, tiny_model: str) -> None:
    plan = plan_training(recipe, 16, model=tiny_model, device="a100")
    console = Console(record=True, width=200)
    show(plan, console)
    text = console.export_text()
    for words in (
        "16 x A100 SXM 80 GB on 2 node(s)", "pretrain: ", "ZeRO-2", "ZeRO-3", "all-reduce of gradients",
        "reduce-scatter of gradients", "the smallest ZeRO stage that fits is 1", "Assumed:", "312 TFLOP/s", "40%",
        "activations if every layer is recomputed", "sent to other nodes",
    ):  # fmt: skip
        assert words in text, words
    assert "NVIDIA" in notes(plan)[0]


def test_the_recipes_own_model_checkpointing_and_sizes_count(recipe: Recipe) -> None:
    first, second = plan_training(recipe, 8).stages
    assert first.step.activations == first.activations[0]
    assert second.step.activations < second.activations[0]
    assert second.step.activations == pytest.approx(second.activations[1], rel=0.01)  # the layers with most of them
    assert (first.step.tokens, first.step.visual_tokens) == (2 * (256 + 4), 2 * 4)
    assert (second.step.tokens, second.zero_stage) == (260, 3)


def test_all_layers_can_be_recomputed(recipe: Recipe, tiny_model: str) -> None:
    plan = plan_training(recipe, 8, model=tiny_model, assumed=Assumptions(recompute=True))
    assert [stage.step.activations for stage in plan.stages] == [stage.activations[1] for stage in plan.stages]


def test_the_smallest_stage_that_fits(recipe: Recipe, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def smallest(memory: float) -> tuple[int | None, str]:
        monkeypatch.setitem(DEVICES, "h100", replace(h100, memory=memory / 0.92))
        plan = plan_training(recipe, 8, model=tiny_model)
        console = Console(record=True, width=200)
        show(plan, console)
        return plan.stages[1].smallest, console.export_text()

    h100 = DEVICES["h100"]
    stage = plan_training(recipe, 8, model=tiny_model).stages[1]
    assert smallest(stage.total)[0] in (1, 2, 3)
    none, text = smallest(0.99 * stage.step.activations)
    assert none is None
    assert "nor does any other: try --recompute, engine.offload=cpu" in text
    assert "before it shares them out" not in smallest(1e9)[1]


def test_offload_moves_the_optimizer(recipe: Recipe, tiny_model: str) -> None:
    here, there = (
        plan_training(
            replace(recipe, engine=EngineConfig(zero_stage=3, offload=where), stages=recipe.stages[1:]), 2,
            model=tiny_model,
        ).stages[0]
        for where in ("none", "cpu")
    )  # fmt: skip
    assert there.total < here.total
    assert there.state.host > 12 * there.trainable / 2
    assert there.update_s > here.update_s


def test_lora_learns_little_and_leaves_the_model_plain(recipe: Recipe, tiny_model: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    trains = 'stages.0.trainable={"llm": 1e-3}'
    both = ([trains], [trains, 'stages.0.lora={"roles": ["llm"], "r": 2}'])
    recipes = [Recipe.load(tmp_path / "recipe.yaml", overrides) for overrides in both]
    plain, lora = (plan_training(recipe, 8, model=tiny_model).stages for recipe in recipes)
    assert 0 < lora[0].trainable < plain[0].trainable
    assert lora[0].parameters == plain[0].parameters + lora[0].trainable
    assert (lora[1].parameters, lora[1].trainable) == (plain[1].parameters, plain[1].trainable)


def test_the_command_prints_json(
    recipe: Recipe, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["plan", "train", str(tmp_path / "recipe.yaml"), "engine.accumulation=1", "--gpus", "4", "--json"]
    monkeypatch.setattr(sys, "argv", ["fastmllm", *arguments, "--model", tiny_model])
    cli.main()
    found = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in found["stages"]] == ["pretrain", "instruct"]
    assert found["layout"]["ranks"] == 4
    assert found["layout"]["engine"]["accumulation"] == 1
    assert found["stages"][0]["state"]["parameters"] == 2 * found["stages"][0]["parameters"]
    assert len(found["notes"]) > 5


def test_a_mistake_is_named(recipe: Recipe) -> None:
    paired = replace(recipe, stages=(replace(recipe.stages[0], kind="contrastive"),))
    with pytest.raises(ValueError, match=r"learn from pairs \(pretrain\) are not planned"):
        plan_training(paired, 2)
    with pytest.raises(ValueError, match="unknown device 'h1000'; choose one of a100"):
        plan_training(recipe, 8, device="h1000")
    with pytest.raises(ValueError, match="no whole number of nodes"):
        plan_training(recipe, 12)
    with pytest.raises(ValueError, match="utilisation is 40"):
        Assumptions(utilisation=40)


def test_a_budget_holds_as_many_assumed_samples_as_fit() -> None:
    stage, assumed = StageConfig(name="s", steps=1, trainable={"a": 1.0}, batch_size=3), Assumptions(text_tokens=100)
    assert samples_of(stage, assumed, 50) == 3
    packed = replace(stage, batch_size=1, max_tokens=1000)
    assert samples_of(packed, assumed, 50) == 1000 // (100 + 50 * assumed.images)
    assert samples_of(replace(packed, max_images=2), replace(assumed, images=1), 50) == 2
    assert samples_of(replace(packed, max_tokens=20), assumed, 50) == 1
