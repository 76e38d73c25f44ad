"""Preferences on a tiny model: the margin grows, the image is encoded once, a stopped run goes on to the bit."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_vlm import colour_photos, tiny_vlm
from train_toy import trainer, values

from fastmllm.data.preference import Pair, PairBatch, collate_pairs, pairs_of
from fastmllm.data.sample import Sample
from fastmllm.infer.respond import collate_for
from fastmllm.train.checkpoint import CheckpointError
from fastmllm.train.losses import anchor_loss, dpo_loss
from fastmllm.train.meters import read_log
from fastmllm.train.prefer import PreferConfig, PreferenceObjective, rewards
from fastmllm.train.stages import StageConfig

RULES = {"connector.*": 3e-3, "language.*": 3e-3}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Eight pairs with an image, two of text alone."""
    root = tmp_path_factory.mktemp("photos")
    samples = [
        Sample(id=f"{p.parent.name}/{p.stem}", prompt="What is this?", answer=p.parent.name, task="name", image=str(p))
        for p in sorted(colour_photos(root, count=2).glob("train/*/*.png"))
    ]
    samples[4:4] = [
        Sample(id="t1", prompt="Is snow white?", answer="yes", task="chat", choices=("yes", "no")),
        Sample(id="t2", prompt="Is snow red?", answer="no", task="chat", choices=("yes", "no")),
    ]
    pairs = pairs_of({"all": samples}, root / "crops")[0]["all"]
    # a crop of a plain square shows the same colour: the image that does not show it is one of the wrong colour
    return [
        pair if pair.corrupted is None
        else replace(pair, corrupted=replace(pair.corrupted, image=str(root / f"train/{pair.rejected.answer}/0.png")))
        for pair in pairs
    ]  # fmt: skip


def pack(model: Any, samples: Any) -> Any:
    return collate_for(model, list(samples), keep=4, image_size=32, load_pixels=True, with_answers=True)


def reference_of(model: Any, pairs: list[Pair]) -> Any:
    """Return sample -> log-probability under a model as it is now."""
    samples = [s for pair in pairs for s in pair.samples]
    with torch.no_grad():
        known = dict(zip([s.id for s in samples], model.log_probs(pack(model, samples)).tolist(), strict=True))
    return lambda sample: known[sample.id]


def batch_of(model: Any, pairs: list[Pair]) -> PairBatch:
    return collate_pairs(pairs, partial(pack, model), reference_of(model, pairs))


def prefer(out: Path, model: Any, pairs: list[Pair], steps: int = 4, **options: Any) -> Any:
    reference = reference_of(tiny_vlm(), pairs)

    def batches(index: int) -> PairBatch:
        drawn = [pairs[(3 * index + i) % len(pairs)] for i in range(3)]
        return collate_pairs(drawn, partial(pack, model), reference)

    config = options.pop("prefer", PreferConfig())
    changes = {"steps": steps, "trainable": RULES, "clip": 1.0, "weight_decay": 0.0, "schedule": "constant"}
    changes |= {"kind": "prefer", "prefer": config}
    objective = partial(PreferenceObjective, config=config)
    return trainer(out, model, batches=batches, objective=objective, changes=changes, **options)


def test_the_objective_is_the_sum_of_its_terms(pairs: list[Pair]) -> None:
    model = tiny_vlm()
    batch = batch_of(model, pairs[4:7])  # text, text, an image
    assert batch.corrupted_pair.tolist() == [2]
    batch.reference += torch.linspace(-1, 1, len(batch.reference))
    policy = [model.log_probs(batch_of(model, [pair]).batch).double() for pair in pairs[4:7]]
    reference = batch.reference.double().split([2, 2, 3])
    config = PreferConfig(beta=0.3, image=0.5, anchor=2.0, anchor_reward=0.1)
    expected = torch.zeros((), dtype=torch.float64)
    for p, r in zip(policy, reference, strict=True):
        expected += dpo_loss(p[0], p[1], r[0], r[1], 0.3) + 2.0 * anchor_loss(p[0], r[0], 0.3, 0.1)
        if len(p) == 3:
            expected += 0.5 * dpo_loss(p[0], p[2], r[0], r[2], 0.3)
    found = PreferenceObjective(model, config)(batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    plain = PreferenceObjective(model, replace(config, image=0.0, anchor=0.0))(batch)
    alone = sum(dpo_loss(p[0], p[1], r[0], r[1], 0.3).item() for p, r in zip(policy, reference, strict=True))
    assert plain.item() == pytest.approx(alone, rel=1e-5)


def test_a_few_steps_raise_the_margin_of_answers_and_of_images(pairs: list[Pair], tmp_path: Path) -> None:
    model, start = tiny_vlm(), batch_of(tiny_vlm(), pairs)
    prefer(tmp_path, model, pairs, steps=24).run()
    chosen, rejected, corrupted = rewards(model, start, beta=0.1)
    assert (chosen > rejected)[start.corrupted_pair].all()
    assert (chosen - rejected).mean() > 0.1
    assert (chosen[start.corrupted_pair] - corrupted).mean() > 0
    assert chosen.mean() > 0
    log = read_log(tmp_path / "log.jsonl")
    # at the first step the policy is the reference: every term is log 2, the image's for those that have one
    with_image = sum(pair.corrupted is not None for pair in pairs[:3])
    assert log[0].loss == pytest.approx((2 + with_image / 3) * 0.6931472, abs=1e-5)
    assert log[-1].loss < 0.9 * log[0].loss
    assert log[0].targets == 3


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_stopped_run_goes_on_to_the_bit(pairs: list[Pair], tmp_path: Path, zero_stage: int) -> None:
    class Stop(Exception):
        pass

    def stop(record: Any) -> None:
        if record.step == 2:
            raise Stop

    engine = {"zero_stage": zero_stage}
    straight, resumed = tiny_vlm(), tiny_vlm()
    prefer(tmp_path / "a", straight, pairs, engine=engine).run()
    with pytest.raises(Stop):
        prefer(tmp_path / "b", tiny_vlm(), pairs, engine=engine, save_every=1, on_step=stop).run()
    prefer(tmp_path / "b", resumed, pairs, engine=engine, save_every=1).run()
    one, two = (read_log(tmp_path / name / "log.jsonl") for name in "ab")
    assert [record.loss for record in one] == [record.loss for record in two]
    assert len(one) == 4
    for name, value in values(straight).items():
        assert torch.equal(value, values(resumed)[name]), name
    with pytest.raises(CheckpointError, match=r"stage\.prefer\.beta: 0\.1 -> 0\.2"):
        prefer(tmp_path / "b", tiny_vlm(), pairs, engine=engine, prefer=PreferConfig(beta=0.2)).run()
    # weights are named as the model names them, not as what stands around it
    learned = {name for name, _ in straight.named_parameters() if not name.startswith("vision.")}
    assert set(load_file(tmp_path / "a" / "trainable.safetensors")) == learned


def test_zero_3_is_plain_training(pairs: list[Pair], tmp_path: Path) -> None:
    losses = []
    for stage in (0, 3):
        prefer(tmp_path / str(stage), tiny_vlm(), pairs, engine={"zero_stage": stage}).run()
        losses.append([record.loss for record in read_log(tmp_path / str(stage) / "log.jsonl")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_pairs_of_text_alone_train(pairs: list[Pair], tmp_path: Path) -> None:
    text = [pair for pair in pairs if pair.corrupted is None]
    assert len(text) == 2
    model = tiny_vlm()
    with pytest.raises(RuntimeError, match="all-zero gradient: connector"):
        prefer(tmp_path / "both", tiny_vlm(), text).run()
    batch = batch_of(tiny_vlm(), text)
    run = prefer(tmp_path / "text", model, text, steps=6, console=Console(file=io.StringIO()))
    run.stage = replace(run.stage, may_be_zero=("connector.*",))
    run.run()
    chosen, rejected, corrupted = rewards(model, batch, beta=0.1)
    assert (chosen > rejected).all()
    assert len(corrupted) == 0


def test_stages_of_this_kind_say_what_they_refuse() -> None:
    rules: dict[str, Any] = {"name": "s", "steps": 1, "trainable": {"a": 1.0}}
    with pytest.raises(ValueError, match="kind is 'dpo'; choose one of instruct, prefer, grpo"):
        StageConfig(**rules, kind="dpo")
    with pytest.raises(ValueError, match="takes one"):
        StageConfig(**rules, kind="prefer", visual_tokens=(1, 4))
    with pytest.raises(ValueError, match=r"beta \(0\) must be positive"):
        PreferConfig(beta=0)
    with pytest.raises(ValueError, match="must be weights of 0 or more"):
        PreferConfig(image=-1.0)
