"""Whole models against transformers: logits, loss, gradients, generation, and checkpoints there and back."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")

from fastmllm.infer.generate import generate
from fastmllm.models.mllm import MLLM
from fastmllm.models.weights.folder import read_state
from tests.support.tiny_mllm import IMAGE, MODELS, oracle

PADDED = ("input_ids", "attention_mask", "mm_token_type_ids", "image_attention_mask", "cross_attention_mask")

READY = list(MODELS)


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


def gradients_as_weights(model):
    """Return a copy of a model whose parameters are its gradients: a checkpoint of them has the checkpoint's names."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for mine, p in zip(twin.parameters(), model.parameters(), strict=True):
            mine.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    return twin


@pytest.mark.parametrize("name", READY)
def test_logits_loss_and_gradients_equal_transformers(name, folders, tmp_path):
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
    gradients_as_weights(theirs).save_pretrained(tmp_path)
    expected = read_state(tmp_path)
    twin = gradients_as_weights(ours)
    twin.checkpoint.spare, twin.checkpoint.rest = {}, {}
    found = twin.checkpoint_state()
    assert found.keys() <= expected.keys()
    largest = max(t.abs().max() for t in expected.values())
    for key, gradient in expected.items():
        if key in found:
            assert (found[key] - gradient).abs().max() <= 1e-4 * largest, key
        else:
            assert gradient.abs().max() == 0, f"{key} is not computed with here, but has a gradient in transformers"


@pytest.mark.parametrize("name", READY)
def test_greedy_generation_equals_transformers(name, folders):
    theirs, batch = oracle(name)
    ours = MLLM.from_pretrained(folders(name))
    mine = generate(ours, ours.inputs(batch), max_new_tokens=6)
    left = dict(batch)  # transformers continues rows that are padded on the left
    for key in set(batch) & set(PADDED):
        rows = [r[m.bool()] for r, m in zip(batch[key], batch["attention_mask"], strict=True)]
        left[key] = torch.stack([torch.cat([r.new_zeros(batch[key].shape[1] - len(r), *r.shape[1:]), r]) for r in rows])
    with torch.no_grad():
        out = theirs.generate(**left, max_new_tokens=6, min_new_tokens=6, do_sample=False)
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
