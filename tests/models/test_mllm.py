"""Whole models against transformers: logits, loss, gradients, generation, and checkpoints there and back."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from fastmllm.infer.generation import generate_tokens
from fastmllm.infer.sampling import SamplingParams
from fastmllm.models.mllm import MLLM
from fastmllm.models.weights.folder import read_state
from tests.support.tiny_mllm import ACROSS, IMAGE, MODELS, alone, joined, oracle

PADDED = ("input_ids", "attention_mask", "mm_token_type_ids", "image_attention_mask", "cross_attention_mask")


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


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_equal_transformers(name, saved, tmp_path):
    theirs, batch = oracle(name)
    ours = MLLM.from_pretrained(saved(name))
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


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_equals_transformers(name, saved):
    theirs, batch = oracle(name)
    ours = MLLM.from_pretrained(saved(name))
    mine = generate_tokens(ours, ours.inputs(batch), SamplingParams(max_new_tokens=6))
    left = dict(batch)  # transformers continues rows that are padded on the left
    for key in set(batch) & set(PADDED):
        rows = [r[m.bool()] for r, m in zip(batch[key], batch["attention_mask"], strict=True)]
        left[key] = torch.stack([torch.cat([r.new_zeros(batch[key].shape[1] - len(r), *r.shape[1:]), r]) for r in rows])
    with torch.no_grad():
        out = theirs.generate(**left, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        again = theirs.generate(**left, max_new_tokens=6, min_new_tokens=6, do_sample=False, repetition_penalty=1.5)
    assert mine == out[:, -6:].tolist()
    penalised = SamplingParams(max_new_tokens=6, repetition_penalty=1.5)
    assert generate_tokens(ours, ours.inputs(batch), penalised) == again[:, -6:].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_is_the_same_checkpoint(name, saved, tmp_path):
    theirs, batch = oracle(name)
    ours = MLLM.from_pretrained(saved(name))
    ours.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, theirs(**batch).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == json.loads((saved(name) / "config.json").read_text())["model_type"]
    second = MLLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), second.state_dict().values(), strict=True))


def test_an_unknown_architecture_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chameleon"}))
    with pytest.raises(ValueError, match=r"model_type 'chameleon'; known: llava, "):
        MLLM.from_pretrained(tmp_path)


# What must hold of every composition ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_unpacked(name, saved):
    ours = MLLM.from_pretrained(saved(name))
    together = ours.inputs(labelled(oracle(name)[1]))
    single = [ours.inputs(labelled(alone(name, row))) for row in range(2)]
    with torch.no_grad():
        parts = [ours.logits(one) for one in single]
        assert relative(ours.logits(together), torch.cat(parts)) <= 2e-6
    loss = ours(together)
    loss.backward()
    without = {n for n, p in ours.named_parameters() if p.grad is None}
    unused = "images.qformer.layers.3.ffn_text." if name == "instructblip" else None  # the text is read no further
    assert all(unused and n.startswith(unused) for n in without), without
    packed_grads = {n: p.grad.clone() for n, p in ours.named_parameters() if n not in without}
    ours.zero_grad()
    losses = [ours(one) for one in single]
    sum(losses).backward()
    assert relative(loss, sum(losses)) <= 1e-6
    largest = max(g.abs().max() for g in packed_grads.values())
    for n, gradient in packed_grads.items():
        assert (gradient - ours.get_parameter(n).grad).abs().max() <= 1e-5 * largest, n


@pytest.mark.parametrize("name", MODELS)
def test_a_later_image_never_moves_an_earlier_row(name, saved):
    ours = MLLM.from_pretrained(saved(name))
    batch = joined(name)
    half = int(oracle(name)[1]["attention_mask"][0].sum())
    changed = dict(batch)
    values = batch["pixel_values"].clone()
    if name in ACROSS:
        values[:, 1] = 1.7 * values[:, 1] + 0.1
    else:
        count = len(alone(name, 1)["pixel_values"])
        values[-count:] = 1.7 * values[-count:] + 0.1
    changed["pixel_values"] = values
    with torch.no_grad():
        before, after = ours.logits(ours.inputs(batch)), ours.logits(ours.inputs(changed))
    assert torch.equal(before[:half], after[:half])
    assert not torch.equal(before[half:], after[half:])


@pytest.mark.parametrize("name", ACROSS)
def test_at_gate_zero_the_model_is_its_language_model(name, saved):
    ours = MLLM.from_pretrained(saved(name))
    with torch.no_grad():
        for layer in ours.language.cross_layers.values():
            layer.attn_gate.zero_()
            layer.ffn_gate.zero_()
        inputs = ours.inputs(oracle(name)[1])
        plan = inputs.plan
        plain = ours.language(
            ours.language.embed(inputs.input_ids), plan.position_ids, plan.cu_seqlens, plan.max_seqlen
        )
        assert torch.equal(ours.start(inputs)[0], plain)


@pytest.mark.parametrize("name", MODELS)
def test_other_pixels_give_another_loss_and_other_gradients(name, saved):
    ours = MLLM.from_pretrained(saved(name))
    batch = labelled(oracle(name)[1])
    seen = []
    for values in (batch["pixel_values"], 0.5 * batch["pixel_values"]):
        ours.zero_grad()
        loss = ours(ours.inputs({**batch, "pixel_values": values}))
        loss.backward()
        seen.append((loss.item(), ours.images.vision.patch_embed.weight.grad.clone()))
    assert seen[0][0] != seen[1][0]
    assert all(gradient.abs().max() > 0 for _, gradient in seen)
    assert relative(seen[1][1], seen[0][1]) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_text_alone_works_and_does_not_depend_on_its_neighbours(name, saved):
    ours = MLLM.from_pretrained(saved(name))
    text = [1, 20, 30, 40, 50]
    batch = {"input_ids": torch.tensor([text]), "labels": torch.tensor([text])}
    only = ours.inputs(batch)
    assert only.images is None
    loss = ours(only)
    loss.backward()
    assert torch.isfinite(loss)
    first = oracle(name)[1]
    ids = torch.zeros(2, first["input_ids"].shape[1], dtype=torch.long)
    ids[0] = first["input_ids"][0]
    ids[1, :5] = torch.tensor(text)
    mask = torch.zeros_like(ids)
    mask[0], mask[1, :5] = first["attention_mask"][0], 1
    mixed = {**alone(name, 0), "input_ids": ids, "attention_mask": mask}
    for key in ("image_attention_mask", "cross_attention_mask"):
        if key in first:  # the second sample has no image: its rows see none
            mixed[key] = torch.cat([first[key][:1], torch.zeros_like(first[key][:1])])
    if name in ACROSS:
        for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            if key in mixed:
                mixed[key] = torch.cat([mixed[key], torch.zeros_like(mixed[key])])
    with torch.no_grad():
        assert relative(ours.logits(ours.inputs(mixed))[-5:], ours.logits(only)) <= 2e-6


def test_rows_before_the_first_image_do_not_leak(saved):
    """transformers 5.23's Mllama lets such rows see the image: changing it changes their logits."""
    theirs, batch = oracle("mllama")
    ours = MLLM.from_pretrained(saved("mllama"))
    seen = batch["cross_attention_mask"].clone()
    seen[:, :3] = 0
    other = batch["pixel_values"].flip(-1)
    with torch.no_grad():
        a, b = (
            ours.logits(ours.inputs({**batch, "cross_attention_mask": seen, "pixel_values": v}))
            for v in (batch["pixel_values"], other)
        )
        leak = [
            theirs(**{**batch, "cross_attention_mask": seen, "pixel_values": v}).logits[:, :3]
            for v in (batch["pixel_values"], other)
        ]
    assert torch.equal(a[:3], b[:3])
    assert not torch.equal(a[3:10], b[3:10])
    assert (leak[0] - leak[1]).abs().max() > 1e-4  # when this fails, transformers is mended: compare these rows too


def test_the_example_of_the_docs_runs_as_it_stands(saved, tmp_path, monkeypatch, capsys):
    tokenizers, tf = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {
        "</s>": 2,
        "<image>": IMAGE,
        **{word: 20 + k for k, word in enumerate(["USER", ":", "What", "is", "this"])},
    }
    spare = {f"word{k}": k for k in set(range(128)) - set(words.values())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | spare, unk_token="word0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<image>", "</s>"])
    size = {"height": 28, "width": 28}
    folder = tmp_path / "llava-1.5-7b-hf"
    shutil.copytree(saved("llava"), folder)
    tf.LlavaProcessor(
        image_processor=tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size),
        tokenizer=tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>"),
        patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    Image.new("RGB", (40, 30), "red").save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "models.md"
    exec(re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1], names := {})
    assert 1 <= len(names["answers"][0]) <= 64
    assert names["loss"] > 0
    assert capsys.readouterr().out.startswith("[")
