from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_toy import RULES, sample, stage, toy, trainer, values

from fastmllm.train.engine import EngineConfig, create_engine, launched_world_size
from fastmllm.train.engine import __file__ as engine_file
from fastmllm.train.meters import StepRecord
from fastmllm.train.rules import apply_rules


@pytest.mark.parametrize(
    "change, message",
    [
        ({"zero_stage": 4}, "choose 0, 1, 2 or 3"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"dtype": "bfloat16", "zero_stage": 0}, "Adam's counter is one ahead"),
        ({"offload": "nvme"}, "none or cpu"),
        ({"offload": "cpu", "zero_stage": 1}, "zero_stage 2 or 3"),
        ({"accumulation": 0}, "must be positive"),
    ],
)
def test_a_bad_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**change)


def test_buckets_are_never_larger_than_what_learns() -> None:
    config = EngineConfig(zero_stage=3, bucket_elements=1000).to_dict(clip=1.0, num_trainable=50)["zero_optimization"]
    assert {value for key, value in config.items() if "bucket" in key} == {64}
    config = EngineConfig(bucket_elements=1000).to_dict(clip=1.0, num_trainable=10**6)["zero_optimization"]
    assert {value for key, value in config.items() if "bucket" in key} == {1024}


def test_a_missing_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> Any:
        if name == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    model = toy()
    with pytest.raises(ImportError, match=r"pip install deepspeed==0\.19\.8"):
        create_engine(model, apply_rules(model, RULES), EngineConfig())


def test_ranks_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(RuntimeError, match=r"MASTER_PORT.* are not set; start the ranks with torchrun"):
        launched_world_size()


def by_hand(
    model: nn.Module, *, steps: int, accumulation: int, clip: float, norms: list[float] | None = None
) -> list[float]:
    """The same stage in plain torch: the reference."""
    config = stage(steps=steps)
    groups = apply_rules(model, config.trainable, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps)
    rates = [group["lr"] for group in groups]
    keys = ("params", "lr", "weight_decay", "betas", "eps")
    optimizer = torch.optim.AdamW([{key: group[key] for key in keys} for group in groups])
    losses = []
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * config.factor(step)
        micro = [sample(step * accumulation + index) for index in range(accumulation)]
        loss = sum((model(batch) for batch in micro), torch.zeros(())) / sum(batch.num_targets for batch in micro)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([param for group in groups for param in group["params"]], clip)
        if norms is not None:
            norms.append(norm.item())
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_stage_is_plain_torch(tmp_path: Path, zero_stage: int) -> None:
    reference, model = toy(), toy()
    frozen = values(model)
    norms: list[float] = []
    expected = by_hand(reference, steps=6, accumulation=2, clip=0.55, norms=norms)
    assert max(norms) > 0.55 > min(norms)  # clipping is at work
    records: list[StepRecord] = []
    run = trainer(tmp_path, model, engine={"zero_stage": zero_stage, "accumulation": 2}, on_step=records.append)
    run.run()
    assert [record.loss for record in records] == pytest.approx(expected, abs=1e-6, rel=0)
    assert expected[-1] < expected[0] - 0.01
    assert [record.grad_norm for record in records] == pytest.approx(norms, rel=1e-4)
    for name, param in model.named_parameters():
        assert torch.allclose(param, dict(reference.named_parameters())[name], atol=1e-5), name
        assert param.requires_grad or torch.equal(param, frozen[name]), name


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_keeps_fp32_buffers_and_learns(tmp_path: Path, zero_stage: int) -> None:
    model = toy()
    model.register_buffer("angles", torch.tensor([1 / 3]))
    records: list[StepRecord] = []
    run = trainer(
        tmp_path, model, engine={"zero_stage": zero_stage, "dtype": "bfloat16"}, on_step=records.append,
        changes={"steps": 12},
    )  # fmt: skip
    run.run()
    assert model.angles.dtype == torch.float32
    assert torch.equal(model.angles, torch.tensor([1 / 3]))
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    reference = by_hand(toy(), steps=12, accumulation=1, clip=0.55)
    assert [record.loss for record in records] == pytest.approx(reference, abs=3e-2)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_frozen_bfloat16_part_stays_so_beside_fp32(tmp_path: Path, zero_stage: int) -> None:
    model = toy()
    model.language.to(torch.bfloat16)
    run = trainer(tmp_path, model, changes={"trainable": {"connector.*": 1e-2}}, engine={"zero_stage": zero_stage})
    result = run.run()
    assert result.loss_last < result.loss_first
    assert {param.dtype for param in model.language.parameters()} == {torch.bfloat16}
    assert {param.dtype for param in model.connector.parameters()} == {torch.float32}


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_close_gives_the_model_back(zero_stage: int) -> None:
    model = toy()
    before, keys = values(model), {name: set(vars(param)) for name, param in model.named_parameters()}
    linear = nn.functional.linear
    kinds = [type(module._parameters) for module in model.modules()]
    engine = create_engine(model, apply_rules(model, RULES), EngineConfig(zero_stage=zero_stage))
    engine.close()
    assert nn.functional.linear is linear
    assert {name: set(vars(param)) for name, param in model.named_parameters()} == keys
    assert [type(module._parameters) for module in model.modules()] == kinds
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    storages = [param.untyped_storage().data_ptr() for param in model.parameters()]
    assert len(set(storages)) == len(storages)
    model(sample(0)).backward()
    assert model.connector[0].weight.grad is not None


def test_offload_to_the_host(tmp_path: Path) -> None:
    records: list[StepRecord] = []
    trainer(tmp_path, toy(), engine={"offload": "cpu"}, on_step=records.append).run()
    expected = by_hand(toy(), steps=6, accumulation=1, clip=0.55)
    assert [record.loss for record in records] == pytest.approx(expected, abs=1e-6, rel=0)


def test_a_loss_that_is_not_one_is_refused() -> None:
    class Vector(nn.Linear):
        def forward(self, batch: Any) -> Tensor:
            return self.weight.sum(0)

    class Detached(nn.Linear):
        def forward(self, batch: Any) -> Tensor:
            return torch.ones(())

    for model, kind, message in (
        (Vector(2, 2), TypeError, r"shape \(2,\); it must give the loss summed"),
        (Detached(2, 2), RuntimeError, "depends on no trainable parameter"),
    ):
        engine = create_engine(model, apply_rules(model, {"weight": 1e-3}), EngineConfig())
        with pytest.raises(kind, match=message):
            engine.loss_sum(sample(0))
        engine.close()


def test_only_the_engine_imports_deepspeed() -> None:
    room = Path(engine_file).parent
    for path in room.glob("*.py"):
        assert ('import_module("deepspeed' in path.read_text()) == (path.name == "engine.py"), path
        assert "import deepspeed" not in path.read_text(), path  # it takes seconds: only when training starts
