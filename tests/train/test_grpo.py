"""GRPO on a tiny model: rewards rise, nothing is learned from equal ones, and a stopped run goes on to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from alignment_toy import grpo
from tiny_vlm import colour_photos, tiny_vlm
from train_toy import values

from fastmllm.train.grpo import GRPOConfig, GRPOObjective
from fastmllm.train.losses import grpo_loss
from fastmllm.train.meters import read_log


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_photos(tmp_path_factory.mktemp("photos"), count=1)


def losses(path: Path) -> list[float]:
    return [record.loss for record in read_log(path / "log.jsonl")]


def test_the_reward_rises(photos: Path, tmp_path: Path) -> None:
    grpo(tmp_path, photos, steps=20, rate=3e-2, grpo={"group": 8, "kl": 0.0}).run()
    rewards = [record.reward for record in read_log(tmp_path / "log.jsonl")]
    assert 0.3 < sum(rewards[:3]) / 3 < 0.7
    assert sum(rewards[-3:]) / 3 > 0.85


def test_answers_are_what_was_sampled(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vlm()
    run = grpo(tmp_path, photos, model=model, grpo={"group": 3, "kl": 0.1, "inner": 2})
    seen: list[int] = []
    encode = model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    prompts = run.batches(0)
    rollouts = run.rollouts
    rollouts.begin()
    (answers,) = rollouts(0, [prompts])
    images = sum(sample.image is not None for sample in prompts.samples) // 3
    assert seen == [images] * 3  # sampling, old and reference: each image of a group once
    tokens = rollouts.sample(prompts.batch)
    assert len(set(prompts.ids)) == 6 == len(tokens)
    assert len({tuple(t) for t in tokens[:3]}) > 1  # the answers of a group differ
    labels = [row[row != -100].tolist() for row in answers.batch.labels.split(answers.batch.cu_seqlens.diff().tolist())]
    assert labels == tokens
    end = model.tokenizer.encode("\n").ids[0]
    assert all(len(t) == 3 or t[-1] == end for t in tokens)
    rewards = torch.tensor([rollouts.reward(s, t) for s, t in zip(prompts.samples, tokens, strict=True)])
    expected = (rewards.view(2, 3) - rewards.view(2, 3).mean(1, keepdim=True)).flatten()
    got = torch.stack([part[0] for part in answers.advantages.split([len(t) for t in tokens])])
    torch.testing.assert_close(got, expected)
    # at the start the policy is the old one and the reference
    torch.testing.assert_close(answers.old, answers.reference)
    assert rollouts(1, [prompts])[0] is answers
    assert rollouts(2, [prompts])[0] is not answers


def test_the_objective_is_the_loss_over_a_constant(photos: Path, tmp_path: Path) -> None:
    model = tiny_vlm()
    run = grpo(tmp_path, photos, model=model, grpo={"kl": 0.2, "inner": 2})
    run.rollouts.begin()
    (answers,) = run.rollouts(0, [run.batches(0)])
    answers.old = answers.old + torch.linspace(-0.5, 0.5, len(answers.old))
    answers.reference = answers.reference - 0.3
    with torch.no_grad():
        policy = model.target_log_probs(answers.batch)
    mask = torch.ones(len(policy), dtype=torch.bool)
    expected = grpo_loss(policy, answers.old, answers.reference, answers.advantages, mask, 0.2, 0.2).sum() / 3
    torch.testing.assert_close(GRPOObjective(model, run.stage.grpo)(answers), expected)


def test_the_reference_is_the_start_not_the_present(photos: Path, tmp_path: Path) -> None:
    model = tiny_vlm()
    run = grpo(tmp_path, photos, model=model, grpo={"kl": 0.2})
    prompts = run.batches(0)
    run.rollouts.begin()
    (before,) = run.rollouts(0, [prompts])
    tokens = run.rollouts.sample(prompts.batch)
    run.rollouts.sample = lambda batch: tokens
    with torch.no_grad():
        model.language.model.norm.weight *= 1.5
    changed = values(model)
    (after,) = run.rollouts(1, [prompts])
    assert torch.equal(before.reference, after.reference)
    assert all(torch.equal(value, changed[name]) for name, value in values(model).items())
    assert not torch.allclose(model.target_log_probs(after.batch), after.reference, atol=1e-3)


def test_equal_rewards_change_nothing(photos: Path, tmp_path: Path) -> None:
    model = tiny_vlm()
    before = values(model)
    grpo(tmp_path, photos, model=model, steps=2, reward=lambda sample, tokens: 0.7).run()
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert [record.grad_norm for record in read_log(tmp_path / "log.jsonl")] == [0.0, 0.0]


@pytest.mark.parametrize("zero_stage, inner", [(2, 1), (3, 1), (2, 3)])
def test_a_stopped_run_goes_on_to_the_bit(photos: Path, tmp_path: Path, zero_stage: int, inner: int) -> None:
    class Stop(Exception):
        pass

    def stop(record: Any) -> None:
        if record.step == 2:
            raise Stop

    options: dict[str, Any] = {"engine": {"zero_stage": zero_stage}, "grpo": {"inner": inner}}
    straight, resumed = tiny_vlm(), tiny_vlm()
    grpo(tmp_path / "a", photos, model=straight, **options).run()
    with pytest.raises(Stop):
        grpo(tmp_path / "b", photos, save_every=1, on_step=stop, **options).run()
    grpo(tmp_path / "b", photos, model=resumed, save_every=1, **options).run()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    one, two = (read_log(tmp_path / name / "log.jsonl") for name in "ab")
    assert [record.reward for record in one] == [record.reward for record in two]
    assert len(losses(tmp_path / "a")) == 4
    for name, value in values(straight).items():
        assert torch.equal(value, values(resumed)[name]), name


def test_zero_3_samples_and_learns_as_plain_training(photos: Path, tmp_path: Path) -> None:
    for stage in (0, 3):
        grpo(tmp_path / str(stage), photos, engine={"zero_stage": stage, "accumulation": 2}).run()
    assert losses(tmp_path / "0") == pytest.approx(losses(tmp_path / "3"), abs=1e-6)
    plain, sharded = (read_log(tmp_path / stage / "log.jsonl") for stage in "03")
    assert [r.grad_norm for r in plain] == pytest.approx([r.grad_norm for r in sharded], rel=1e-4)
    assert [r.tokens for r in plain] == [r.tokens for r in sharded]


def test_prompts_are_a_function_of_their_index(photos: Path, tmp_path: Path) -> None:
    run = grpo(tmp_path, photos, grpo={"inner": 2}, engine={"accumulation": 2})
    ids = [run.batches(index).ids for index in range(8)]
    assert ids[:2] == ids[2:4]
    assert ids[4:6] == ids[6:]
    assert len({name for row in ids for name in row}) == 4 * 2 * 4


def test_configurations_say_what_they_refuse() -> None:
    with pytest.raises(ValueError, match=r"group \(1\) must be at least 2"):
        GRPOConfig(group=1)
    with pytest.raises(ValueError, match=r"clip \(1.5\) must lie between 0 and 1"):
        GRPOConfig(clip=1.5)
