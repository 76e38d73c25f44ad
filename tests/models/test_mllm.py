"""Whole models against transformers: logits, loss, gradients, generation, and checkpoints there and back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from fastmllm.infer.generate import generate
from fastmllm.models.mllm import MLLM
from tests.support.tiny_mllm import IMAGE, MODELS, oracle

READY = [n for n in MODELS if n not in ("blip2", "instructblip", "idefics", "mllama")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Give a function: name of a family -> folder that transformers wrote."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            oracle(name)[0].save_pretrained(made[name])
        return made[name]

    return folder


def packed(logits, batch):
    return logits[batch["attention_mask"].bool()]


def labelled(batch):
    labels = batch["input_ids"].masked_fill((batch["input_ids"] == IMAGE) | (batch["attention_mask"] == 0), -100)
    return {**batch, "labels": labels}


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", READY)
def test_logits_loss_and_gradients_equal_transformers(name, folders):
    theirs, batch = oracle(name)
    ours = MLLM.from_pretrained(folders(name))
    inputs = ours.inputs(labelled(batch))
    with torch.no_grad():
        assert relative(ours.logits(inputs), packed(theirs(**batch).logits, batch)) <= 1e-5
    theirs.zero_grad()
    loss = theirs(**labelled(batch)).loss
    loss.backward()
    mine = ours(inputs) / inputs.plan.num_targets
    mine.backward()
    assert relative(mine, loss) <= 1e-5
    # compare gradients under the checkpoint's names: as if they were weights
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    found = ours.checkpoint_state()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    theirs.zero_grad()
    with torch.no_grad():
        saved = {n: p.clone() for n, p in theirs.named_parameters()}
        for n, p in theirs.named_parameters():
            p.copy_(expected[n])
    # transformers' own writer brings its gradients under the same names
    import tempfile

    from fastmllm.models.weights.folder import read_state

    with tempfile.TemporaryDirectory() as at:
        theirs.save_pretrained(at)
        written = read_state(__import__("pathlib").Path(at))
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            p.copy_(saved[n])
    largest = max(t.abs().max() for t in written.values())
    for key, value in written.items():
        if key in ours.checkpoint.rest or key not in found:
            assert value.abs().max() == 0, f"{key} has a gradient in transformers"
            continue
        assert (found[key] - value).abs().max() <= 1e-4 * largest, key


@pytest.mark.parametrize("name", READY)
def test_greedy_generation_equals_transformers(name, folders):
    theirs, batch = oracle(name)
    ours = MLLM.from_pretrained(folders(name))
    for row in range(2):
        one = {k: v[row : row + 1] for k, v in batch.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        length = int(one["attention_mask"].sum())
        one = {k: v[:, :length] for k, v in one.items()}
        alone = ours.inputs({**batch, **one}) if False else None
        del alone
    mine = generate(ours, ours.inputs(batch), max_new_tokens=6)
    left = {}
    length = batch["input_ids"].shape[1]
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in batch:
            rows = [r[m.bool()] for r, m in zip(batch[key], batch["attention_mask"], strict=True)]
            left[key] = torch.stack([torch.cat([r.new_zeros(length - len(r)), r]) for r in rows])
    with torch.no_grad():
        out = theirs.generate(**{**batch, **left}, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert mine == out[:, -6:].tolist()


@pytest.mark.parametrize("name", READY)
def test_a_saved_folder_is_the_same_checkpoint(name, folders, tmp_path):
    theirs, batch = oracle(name)
    ours = MLLM.from_pretrained(folders(name))
    ours.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, theirs(**batch).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == json.loads((folders(name) / "config.json").read_text())["model_type"]
    second = MLLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), second.state_dict().values(), strict=True))


def test_an_unknown_architecture_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chameleon"}))
    with pytest.raises(ValueError, match=r"model_type 'chameleon'; known: llava, "):
        MLLM.from_pretrained(tmp_path)
