"""Adapters by role: they learn alone, resume to the bit, are written as peft reads them, and merge checked."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_vlm import tiny_vlm
from train_toy import stage, trainer, values

from fastmllm.data.sample import Sample
from fastmllm.infer.respond import collate_for
from fastmllm.models.vlm import VLM
from fastmllm.train.checkpoint import CheckpointError
from fastmllm.train.lora import Adapters, LoRAConfig
from fastmllm.train.meters import read_log
from fastmllm.train.rules import apply_rules

peft = pytest.importorskip("peft")
LORA = {"roles": ("vision", "llm"), "r": 2, "alpha": 8.0, "dropout": 0.1}
READER = tiny_vlm()  # its tokenizer; made once, as making it seeds torch
RULES = {"vision": 1e-2, "llm": 1e-2, "connector": 1e-3}


class Stop(Exception):
    pass


def batch(index: int) -> Any:
    """One sample that shows a picture, one that shows none."""
    samples = [
        Sample(id=name, prompt="What is this?", answer=name, task="name", image=None) for name in ("red", "blue")
    ]
    samples[0] = Sample(id="seen", prompt="What is this?", answer="green", task="name", image=f"picture-{index}")
    packed = collate_for(READER, samples, keep=4, image_size=32, load_pixels=False, with_answers=True)
    draw = torch.Generator().manual_seed(index)
    packed.pixels = torch.randint(0, 256, (1, 32, 32, 3), generator=draw, dtype=torch.uint8)
    return packed


def run(out: Path, model: VLM, zero_stage: int = 2, **options: Any) -> Any:
    changes = {"steps": 3, "trainable": RULES, "lora": LoRAConfig(**LORA)} | options.pop("changes", {})
    return trainer(out, model, changes=changes, engine={"zero_stage": zero_stage}, batches=batch, **options)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_they_learn_resume_and_merge(tmp_path: Path, zero_stage: int) -> None:
    fresh, straight, cut = tiny_vlm(), tiny_vlm(), tiny_vlm()
    run(tmp_path / "a", straight, zero_stage).run()
    before, after = values(fresh), values(straight)
    assert list(before) == list(after)  # names are plain again
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = (".self_attn.", ".attn.", "layers.0.mlp.", "layers.1.mlp.")
    adapted = {name for name in before if any(part in name for part in linear) and name.endswith("weight")}
    assert changed == adapted | {name for name in before if name.startswith("connector.")}
    assert set(load_file(tmp_path / "a" / "trainable.safetensors")) == changed

    def stop(record: Any) -> None:
        if record.step == 2:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "b", cut, zero_stage, save_every=1, on_step=stop).run()
    assert list(values(cut)) == list(before)
    run(tmp_path / "b", resumed := tiny_vlm(), zero_stage, save_every=1).run()
    losses = [[r.loss for r in read_log(tmp_path / name / "log.jsonl")] for name in "ab"]
    assert losses[0] == losses[1]
    assert all(torch.equal(value, after[name]) for name, value in values(resumed).items())
    again = run(tmp_path / "a", reused := tiny_vlm(), zero_stage).run()
    assert again.reused
    assert all(torch.equal(value, after[name]) for name, value in values(reused).items())

    # what peft puts on the model as it was is the merged one
    loaded = tiny_vlm()
    loaded.connector.load_state_dict(straight.connector.state_dict())
    with_adapters = peft.PeftModel.from_pretrained(loaded, str(tmp_path / "a" / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(with_adapters.base_model.model.logits(batch(7)), straight.logits(batch(7)))
        assert (fresh.logits(batch(7)) - straight.logits(batch(7))).abs().max() > 1e-3


@pytest.mark.parametrize("broken", ["merge", "unload"])
def test_a_merge_that_does_not_merge_names_the_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "merge":
        monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda *_, **__: None)
        message = "role 'llm': the merged weight of language.model.layers.0.self_attn.q_proj is not"
    else:

        def other(self: Adapters, name: str, layer: Any) -> None:
            layer.get_base_layer().weight.data.mul_(1.5)
            put(self, name, layer)

        put = Adapters._put_back
        monkeypatch.setattr(Adapters, "_put_back", other)
        message = "with role 'llm' merged, outputs differ by"
    with pytest.raises(CheckpointError, match=f"{message}.*the adapters are saved and not merged"):
        run(tmp_path, tiny_vlm(), changes={"lora": LoRAConfig(roles=("llm",)), "trainable": {"llm": 1e-2}}).run()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "result.json").exists()


def test_only_adapters_of_the_named_layers_learn() -> None:
    model = tiny_vlm()
    adapters = Adapters(model, LoRAConfig(roles=("llm",), targets=("q_proj", "v_proj")), seed=1)
    groups = apply_rules(model, {"llm": 1e-3, "embeddings": 1e-4}, frozen=adapters.frozen())
    names = {name: group["name"] for group in groups for name in group["names"]}
    assert {name for name, rule in names.items() if rule == "llm"} == {
        f"language.model.layers.{k}.self_attn.{p}.lora_{m}.default.weight" for k in "01" for p in ("q_proj", "v_proj")
        for m in "AB"
    }  # fmt: skip
    assert "embeddings" in names.values()
    same = tiny_vlm()
    Adapters(same, LoRAConfig(roles=("llm",), targets=("q_proj", "v_proj")), seed=1)
    assert all(torch.equal(value, values(same)[name]) for name, value in values(model).items())
    adapters.remove()
    adapters.remove()
    assert all(torch.equal(value, values(tiny_vlm())[name]) for name, value in values(model).items())


def test_what_cannot_be_adapted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for roles, targets, message in (
        (("cross_attention",), (), "'cross_attention' is no role of this model; it has vision, connector, llm"),
        (("connector",), (), "role 'connector' has no linear layer of any name; it has: none"),
        (("llm",), ("query",), r"no linear layer of \['query'\]; it has: down_proj, gate_proj, k_proj"),
    ):
        with pytest.raises(ValueError, match=message):
            Adapters(tiny_vlm(), LoRAConfig(roles=roles, targets=targets))
    for wrong in ({"roles": ()}, {"roles": ("llm",), "r": 0}, {"roles": ("llm",), "dropout": 1.0}):
        with pytest.raises(ValueError, match="lora: needs roles"):
            LoRAConfig(**wrong)
    with pytest.raises(ValueError, match="stage 'toy': lora is for llm, which has no rule"):
        stage(lora=LoRAConfig(roles=("llm",)))
    real = importlib.import_module

    def without(name: str) -> Any:
        if name == "peft":
            raise ImportError("no module")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ImportError, match="pip install peft"):
        Adapters(tiny_vlm(), LoRAConfig(roles=("llm",)))
