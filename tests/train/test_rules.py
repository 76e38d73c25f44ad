"""Rules by role: who learns, how fast, and what is recomputed; the same steps under every ZeRO stage."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_compositions import allowed, labels, samples, tiny
from tiny_vlm import colour_photos, tiny_vlm
from train_toy import stage, trainer, values

from fastmllm.config import ConfigError, build
from fastmllm.data.sample import Sample
from fastmllm.infer.respond import collate_for
from fastmllm.models.mllm import MLLM
from fastmllm.models.recompute import is_recomputed
from fastmllm.train.engine import EngineConfig
from fastmllm.train.rules import Rule, apply_rules, recomputed_by
from fastmllm.train.stages import GradientCheck, StageConfig
from fastmllm.train.table import stage_table


def test_roles_come_before_patterns_and_have_their_own_decay() -> None:
    model = tiny_vlm()
    rules = {
        "llm": Rule(lr=1e-4, weight_decay=0.05), "vision": 1e-5, "connector": Rule(lr=1e-3),
        "language.model.layers.0.*": 0.0, "language.model.norm.*": 2e-4,
    }  # fmt: skip
    groups = apply_rules(model, rules, weight_decay=0.1)
    found = {name: (group["name"], group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found["language.model.layers.1.mlp.up_proj.weight"] == ("llm", 1e-4, 0.05)
    assert found["language.model.layers.1.input_layernorm.weight"] == ("llm", 1e-4, 0.0)
    assert found["vision.blocks.0.attn.qkv.weight"] == ("vision", 1e-5, 0.1)
    assert found["connector.mlp.weight1"] == ("connector", 1e-3, 0.1)
    assert found["language.model.norm.weight"][:2] == ("language.model.norm.*", 2e-4)
    learning = {name for name, param in model.named_parameters() if param.requires_grad}
    assert learning == set(found)
    assert not any(name.startswith("language.model.layers.0.") for name in learning)
    assert not learning & set(model.roles()["embeddings"])


@pytest.mark.parametrize(
    "rules, message",
    [
        (
            {"cross_attention": 1e-3},
            "'cross_attention' is no role of this model; it has vision, connector, llm,",
        ),
        ({"connector.*": Rule(lr=1e-3, checkpointing=True)}, "checkpointing is of a role, not of a pattern"),
        ({"llm": 1e-3, "language.*": 1e-4}, "'llm' decides nothing"),
        ({"llm": Rule(lr=0, checkpointing=True)}, "every rule has rate 0"),
    ],
)
def test_a_rule_that_does_nothing_is_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_rules(tiny_vlm(), rules)


def test_a_recipe_says_roles() -> None:
    raw = {
        "name": "s",
        "steps": 1,
        "trainable": {"vision": {"lr": "1e-5", "weight_decay": 0.05, "checkpointing": True}},
    }
    made: StageConfig = build(StageConfig, raw | {"zero_stage": 3, "offload": "cpu"}, "stage")
    assert made.trainable == {"vision": Rule(lr=1e-5, weight_decay=0.05, checkpointing=True)}
    assert made.engine(EngineConfig(accumulation=2)) == EngineConfig(zero_stage=3, offload="cpu", accumulation=2)
    assert stage().engine(EngineConfig(zero_stage=1)) == EngineConfig(zero_stage=1)
    with pytest.raises(ConfigError, match="did you mean 'weight_decay'"):
        build(StageConfig, raw | {"trainable": {"vision": {"lr": 1.0, "weight_deca": 0.1}}}, "stage")
    for wrong in ({"zero_stage": 4}, {"image_size": 0}, {"trainable": {"llm": {"lr": -1.0}}},
                  {"trainable": {"llm": {"lr": 1.0, "weight_decay": -1.0}}}):  # fmt: skip
        with pytest.raises(ConfigError, match=r"stage"):
            build(StageConfig, raw | wrong, "stage")
    with pytest.raises(ValueError, match="stage 'toy': engine: offload=cpu needs zero_stage 2 or 3, not 1"):
        stage(offload="cpu").engine(EngineConfig(zero_stage=1))
    # what is spread or recomputed is no other recipe
    plain = build(StageConfig, raw | {"trainable": {"vision": {"lr": 1e-5, "weight_decay": 0.05}}}, "stage")
    assert made.identity() == plain.identity()


def test_the_table_shows_roles() -> None:
    model = tiny_vlm()
    rules = {"connector": Rule(lr=1e-3, weight_decay=0.1), "llm": Rule(lr=0, checkpointing=True)}
    console = Console(file=io.StringIO(), width=140)
    console.print(stage_table(model, apply_rules(model, rules), "title", recomputed_by(model, rules)))
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    rows = {line[0]: line[1:] for line in lines if len(line) > 3}
    connector = f"{sum(p.numel() for p in model.connector.parameters()):,}"
    assert rows["connector"] == ["connector", connector, connector, "0.001", "0.1"]
    assert rows["language.model.layers"][0] == "llm"
    assert rows["language.model.layers"][-3:] == ["frozen", "-", "yes"]
    assert rows["vision"][-2:] == ["frozen", "-"]


ROLES = {
    "vision": Rule(lr=1e-3, checkpointing=True), "connector": Rule(lr=1e-3, checkpointing=True),
    "llm": Rule(lr=0, checkpointing=True), "embeddings": 1e-3,
}  # fmt: skip


def vlm_run(out: Path, photos: Path, rules: dict[str, Any], zero_stage: int) -> tuple[list[float], Any, Counter[str]]:
    """Train two steps, the second without an image; return losses, weights and how often parts ran."""
    model, calls = tiny_vlm(), Counter[str]()
    pictures = sorted(photos.rglob("*.png"))

    def batch(step: int) -> Any:
        image = None if step == 1 else str(pictures[step])
        asked = [Sample(id="a", prompt="What is this?", answer="red", task="name", image=image)]
        return collate_for(model, asked, keep=4, image_size=32, load_pixels=True, with_answers=True)

    for name in ("vision.blocks.0", "connector", "language.model.layers.0", "language.model.layers.1"):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    records: list[Any] = []
    trainer(
        out, model, engine={"zero_stage": zero_stage}, batches=batch, on_step=records.append,
        changes={"steps": 2, "trainable": rules},
    ).run()  # fmt: skip
    assert not any(is_recomputed(module) for module in model.modules())
    return [record.loss for record in records], values(model), calls


def test_recomputed_roles_are_the_same_steps_under_every_zero_stage(tmp_path: Path) -> None:
    photos = colour_photos(tmp_path / "photos", count=1)
    kept: dict[str, Any] = {key: rule.lr if isinstance(rule, Rule) else rule for key, rule in ROLES.items()}
    for zero_stage in (0, 1, 2, 3):
        plain, weights, once = vlm_run(tmp_path / f"plain{zero_stage}", photos, kept, zero_stage)
        losses, same, twice = vlm_run(tmp_path / f"again{zero_stage}", photos, ROLES, zero_stage)
        assert losses == plain, zero_stage
        assert set(once.values()) == {2}
        assert set(twice.values()) == {4}, (zero_stage, twice)
        for name, value in weights.items():
            assert torch.equal(value, same[name]), (zero_stage, name)


def test_a_role_of_zero_gates_may_get_no_gradient() -> None:
    parts = next(p for p in allowed() if p[3] == "flamingo" and p[2] == "resampler")
    model = MLLM.from_config(tiny(*parts)).train()
    inputs = model.pack(batch := samples(), labels(batch))
    rules = {"cross_attention": 1e-3, "connector": 1e-3}
    for may_be_zero in ((), ("cross_attention", "connector")):
        check = GradientCheck(model, apply_rules(model, rules), may_be_zero)
        model.zero_grad()
        model(inputs).backward()
        if may_be_zero:
            check.verify([check.close()])
        else:
            with pytest.raises(RuntimeError, match="behind a zero-init gate"):
                check.verify([check.close()])
    with pytest.raises(ValueError, match="may_be_zero: 'llm' names no trainable parameter"):
        GradientCheck(model, apply_rules(model, rules), ("llm",))
