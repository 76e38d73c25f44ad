"""Gated cross-attention: an image's keys and values are made once, and never those of another image or weight."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import pytest
import torch
from tiny_hf import draw
from tiny_hf_fusion import idefics, idefics_batch, idefics_prompt

from fastmllm.hf import patch, unpatch
from fastmllm.hf.fused.gated_cross_attention import KEPT
from fastmllm.hf.rules import OPS

NEW = 6


@pytest.fixture
def model():
    return idefics()


def projections(model):
    return [
        p for layer in model.model.gated_cross_attn_layers for p in (layer.cross_attn.k_proj, layer.cross_attn.v_proj)
    ]


def say(model, prompt, **more):
    return model.generate(**prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **more)


def watch(model):
    """Return, for each projection, what it returns from now on."""
    seen = [[] for _ in projections(model)]
    for projection, results in zip(projections(model), seen, strict=True):
        projection.register_forward_hook(lambda module, args, result, results=results: results.append(result))
    return seen


def other_prompt():
    return {**idefics_prompt(), "pixel_values": draw(3, 2, 3, 28, 28, seed=9)}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("resampler", [True, False])
def test_projects_once_a_prompt(resampler, beams):
    model = idefics(use_resampler=resampler)
    prompts = [idefics_prompt(), other_prompt(), idefics_prompt()]
    expected = [say(model, prompt, num_beams=beams) for prompt in prompts]
    patch(model, ops=["image_kv_cache"])
    seen = watch(model)
    for prompt, tokens in zip(prompts, expected, strict=True):
        for results in seen:
            results.clear()
        assert torch.equal(say(model, prompt, num_beams=beams), tokens)
        assert [len(results) for results in seen] == [NEW] * len(seen)
        assert [len({id(result) for result in results}) for results in seen] == [1] * len(seen)


def test_nothing_is_held_behind_a_generation(model):
    patch(model, ops=["image_kv_cache"])
    say(model, idefics_prompt())
    kept = [m.__dict__[name] for m in model.modules() for name in m.__dict__ if name.startswith(KEPT)]
    assert len(kept) == 2 * len(projections(model))
    assert all(k.result is None and not k.marks for k in kept)


def test_copies_and_pickles_carry_no_keys(model):
    layer, image, step = decoding(model)
    patch(model, ops=["image_kv_cache"])
    said = step(image)
    kept = layer.cross_attn.k_proj.__dict__[KEPT]
    assert kept.result is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(p.__dict__.get(KEPT) is None or p.__dict__[KEPT].result is None for p in projections(twin))
    torch.save(model, io.BytesIO())
    assert kept.result is not None
    assert torch.equal(step(image), said)


def decoding(model):
    """Return a gated layer, image features, and one decoding step over features."""
    layer, text, seen = model.model.gated_cross_attn_layers[0], draw(2, 1, 48), torch.zeros(2, 1, 1, 8)
    gate = torch.ones(2, 1)

    def step(image, words=1):
        with torch.no_grad():
            return layer(
                text.expand(-1, words, -1), None, image, image_attention_mask=seen.expand(-1, -1, words, -1),
                cross_attention_gate=gate.expand(-1, words),
            )  # fmt: skip

    return layer, draw(2, 8, 32, seed=2), step


def change_in_place(layer, image):
    image.mul_(-1)


def change_other_view(layer, image):
    image.flatten()[3:5].fill_(4.0)


def change_weight(layer, image):
    with torch.no_grad():
        layer.cross_attn.k_proj.weight.neg_()


def change_weight_tensor(layer, image):
    layer.cross_attn.v_proj.weight.data = -layer.cross_attn.v_proj.weight.data


def change_parameter(layer, image):
    layer.cross_attn.v_proj.weight = torch.nn.Parameter(-layer.cross_attn.v_proj.weight.detach())


def change_state(layer, image):
    layer.load_state_dict({name: -t for name, t in layer.state_dict().items()})


def change_norm(layer, image):
    with torch.no_grad():
        layer.cross_attn.k_layer_norm.weight.neg_()


def change_result(layer, image):
    layer.cross_attn.k_proj.register_forward_hook(lambda module, args, result: result.neg_())


CHANGES = [value for name, value in list(globals().items()) if name.startswith("change_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_is_seen_at_the_next_step(model, change):
    results = []
    for patched in (False, True):
        one = copy.deepcopy(model)
        if patched:
            patch(one, ops=["image_kv_cache"])
        layer, image, step = decoding(one)
        before = step(image)
        change(layer, image)
        results.append([before, step(image), step(image)])
        assert not torch.equal(before, results[-1][1])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_one_word_reads_each_head_next_to_each_other(model):
    patch(model, ops=["image_kv_cache"])
    layer, image, step = decoding(model)
    step(image)
    kept = [layer.cross_attn.__dict__[KEPT + name].result for name in ("_keys", "_values")]
    assert all(t.is_contiguous() and t.shape == (2, 4, 8, 12) for t in kept)
    step(image)
    again = [layer.cross_attn.__dict__[KEPT + name].result for name in ("_keys", "_values")]
    assert all(new is old for new, old in zip(again, kept, strict=True))


def test_a_hook_on_the_norm_sees_every_step(model):
    patch(model, ops=["image_kv_cache"])
    layer, image, step = decoding(model)
    seen = []
    layer.cross_attn.k_layer_norm.register_forward_hook(lambda *args: seen.append(1))
    for _ in range(3):
        step(image)
    assert len(seen) == 3


def test_a_write_that_nothing_counts_is_seen_at_the_next_prompt(model):
    plain, fused = copy.deepcopy(model), model
    patch(fused, ops=["image_kv_cache"])
    found = []
    for one in (plain, fused):
        layer, image, step = decoding(one)
        step(image, words=3)
        layer.cross_attn.k_proj.weight.data.neg_()
        layer.cross_attn.k_layer_norm.weight.data.mul_(3)
        found.append((step(image, words=3), step(image)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_another_image_at_the_same_address_is_another_image(model):
    _, image, step = decoding(model)
    other = draw(2, 8, 32, seed=3)
    expected = step(other)
    patch(model, ops=["image_kv_cache"])
    memory = bytearray(image.numpy().tobytes())
    first = torch.frombuffer(memory, dtype=torch.float32).view_as(image)
    step(first)
    memory[:] = other.numpy().tobytes()
    second = torch.frombuffer(memory, dtype=torch.float32).view_as(image)
    assert (second.data_ptr(), second._version) == (first.data_ptr(), first._version)
    assert torch.equal(step(second), expected)


def test_parts_of_one_tensor_are_other_images(model):
    _, _, step = decoding(model)
    images = draw(4, 8, 32, seed=3)
    parts = [images[:2], images[2:], images[::2], images[:2].flip(1), images[:2].mT.reshape(2, 8, 32)]
    expected = [step(part) for part in parts]
    patch(model, ops=["image_kv_cache"])
    for _ in range(2):
        assert all(torch.equal(step(part), tokens) for part, tokens in zip(parts, expected, strict=True))


def test_a_gradient_behind_a_step_reaches_the_projections(model):
    """In eval mode too, as for a saliency map."""
    patch(model, ops=["image_kv_cache"])
    layer, image, step = decoding(model)
    step(image)
    with torch.enable_grad():
        layer.cross_attn.k_proj(image).sum().backward()
    assert layer.cross_attn.k_proj.weight.grad.abs().max() > 0
    assert not step(image).requires_grad


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_without_counted_writes_keep_nothing(model, mode):
    plain = copy.deepcopy(model)
    patch(model, ops=["image_kv_cache"])
    with mode():
        for _ in range(2):
            (_, image, theirs), (layer, _, ours) = decoding(plain), decoding(model)
            assert torch.equal(ours(image), theirs(image))
            assert KEPT not in layer.cross_attn.k_proj.__dict__


def test_what_is_made_anew_is_not_piled_up(model):
    """A result that somebody writes into is made at every step; the earlier ones go."""
    patch(model, ops=["image_kv_cache"])
    layer, image, step = decoding(model)
    made = []
    projection = layer.cross_attn.k_proj
    projection.register_forward_hook(lambda module, args, result: made.append(weakref.ref(result.neg_())))
    for _ in range(4):
        step(image)
    assert [result() is not None for result in made] == [False, False, False, True]
    unpatch(model)
    assert made[-1]() is None


@pytest.mark.parametrize("words", [1, 3])
def test_compiles_in_one_graph(model, words):
    layer, image, step = decoding(model)
    expected = step(image, words)
    patch(model, ops=["gated_residual", "image_kv_cache", "rms_norm"])
    layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(step(image, words), expected, rtol=1e-5, atol=1e-5)


def test_training_behind_a_step_gets_every_gradient(model):
    batch = idefics_batch()
    patch(model, ops=OPS)
    _, image, step = decoding(model)
    step(image)
    model.train()
    model(**batch).loss.backward()
    assert all(p.weight.grad is not None and p.weight.grad.abs().max() > 0 for p in projections(model))
    assert all(KEPT not in p.__dict__ or p.__dict__[KEPT].result is None for p in projections(model)[2:])


def test_lora_before_and_behind_patching(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    prompt = idefics_prompt()
    expected = say(adapted, prompt)
    report = patch(adapted, ops=["image_kv_cache"])
    assert {row.reason for row in report.left} == {"a part of it is Linear, which has to be called"}
    assert torch.equal(say(adapted, prompt), expected)
    patch(model, ops=["image_kv_cache"])
    torch.manual_seed(0)
    behind = peft.get_peft_model(model, config)
    assert torch.equal(say(behind, prompt), expected)


def test_an_additional_vocabulary_keeps_transformers_loss():
    report = patch(idefics(additional_vocab_size=4), ops=["linear_cross_entropy"])
    assert [row.reason for row in report.left] == ["its head is IdeficsDecoupledLinear, not nn.Linear without bias"]
