"""Llama-3.2-Vision's cross-attention by spans of keys: what each word sees, with and without a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_checks import allowed, distance
from tiny_hf import draw
from tiny_hf_fusion import mllama, mllama_batch, mllama_prompt
from transformers import DynamicCache

from fastmllm.hf import patch
from fastmllm.hf.fused import spans
from fastmllm.hf.fused.tile_attention import TileAttention

WORDS, TILES, TOKENS = 5, 6, 7
SEEN = {  # which of the tiles each word sees, by sample; a row of ones is what transformers makes of a row of zeros
    "neighbours": [[[1] * 6, [0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0]]] * 2,
    "padding between": [
        [[1] * 6, [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1]],
        [[1] * 6, [1] * 6, [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0]],
    ],
    "no order": [[[1] * 6, [1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]] * 2,
}


@pytest.fixture
def attention():
    module = mllama().model.language_model.layers[1].cross_attn.eval()
    module.config._attn_implementation = "sdpa"
    module.layer_idx = 0  # transformers 5.17 asks a cache's first layer whether there is an image
    return module


def masked(seen, dtype=torch.float32):
    seen = torch.tensor(SEEN[seen] if isinstance(seen, str) else seen).repeat_interleave(TOKENS, -1)[:, None]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(seen == 0, torch.finfo(dtype).min)


def text(samples=2):
    return draw(samples, WORDS, 48)


def images(samples=2):
    return draw(samples * TILES, TOKENS, 48, seed=2)


def formula(attention, text, image, mask):
    """softmax(q k^T / sqrt(d) + mask) v."""
    heads, groups = attention.num_heads, attention.num_key_value_groups
    image = image.view(text.shape[0], -1, image.shape[-1])
    q = attention.q_norm(attention.q_proj(text).unflatten(-1, (heads, -1))).transpose(1, 2)
    k = attention.k_norm(attention.k_proj(image).unflatten(-1, (heads // groups, -1))).transpose(1, 2)
    v = attention.v_proj(image).unflatten(-1, (heads // groups, -1)).transpose(1, 2)
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = q @ k.mT * attention.head_dim**-0.5
    seen = (scores if mask is None else scores + mask).softmax(-1) @ v
    return attention.o_proj(seen.transpose(1, 2).flatten(2))


def results(call, attention, dtype, seen):
    """Return the output and every gradient, computed in a dtype from what bf16 can hold."""
    one = copy.deepcopy(attention).to(dtype)
    leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (text(), images())]
    out = call(one, *leaves, None if seen is None else masked(seen, dtype))
    out.backward(draw(*out.shape, seed=9).bfloat16().to(dtype))
    return [out.detach(), *(t.grad for t in leaves), *(p.grad for p in one.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seen", ["neighbours", "padding between", None])
def test_is_as_near_to_the_formula_as_transformers(attention, seen, dtype):
    def ours(module, text, image, mask):
        report = patch(module, ops=["cross_attention"])
        out = module(text, image, None, mask)[0]
        assert report.replaced
        assert not report.fallbacks()
        return out

    def theirs(module, text, image, mask):
        if mask is None:  # where transformers' SDPA would be causal
            mask = text.new_zeros(2, 1, WORDS, TILES * TOKENS)
        return module(text, image, None, mask)[0]

    attention = attention.bfloat16().float()
    truth = results(formula, attention, torch.float64, seen)
    before, after = (results(call, attention, dtype, seen) for call in (theirs, ours))
    for mine, other, right in zip(after, before, truth, strict=True):
        assert distance(mine, right) <= allowed(distance(other, right), dtype)


def test_without_a_mask_transformers_sdpa_is_wrong_and_the_patched_model_right():
    """Without `cross_attention_mask` every word sees every tile: so says the formula, and transformers' eager code.

    transformers' SDPA is wrong there: the module lacks `is_causal`, which defaults to True, so that word n of a prompt
    sees the first n of the image's tokens, and a decoded word all of them.
    """
    batch = {name: t for name, t in mllama_batch().items() if name not in ("cross_attention_mask", "labels")}
    batch["pixel_values"] = batch["pixel_values"].double()
    found = {}
    for implementation in ("eager", "sdpa"):
        model = mllama().double()
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found[implementation] = model(**batch).logits
            patch(model, ops=["cross_attention"])
            found["patched " + implementation] = model(**batch).logits
    assert (found["sdpa"] - found["eager"]).abs().max() > 0.01
    torch.testing.assert_close(found["patched sdpa"], found["eager"], rtol=1e-4, atol=1e-5)  # eager's softmax is fp32
    assert torch.equal(found["patched eager"], found["eager"])
    attention = mllama().double().model.language_model.layers[1].cross_attn
    attention.config._attn_implementation = "sdpa"
    words, image = text().double(), images().double()
    expected = formula(attention, words, image, None)
    assert (attention(words, image)[0] - expected).abs().max() > 0.01
    patch(attention, ops=["cross_attention"])
    torch.testing.assert_close(attention(words, image)[0], expected)


@pytest.mark.parametrize("samples", [1, 2])
def test_decodes_over_a_cache(attention, samples):
    """The cache's heads are outside of its keys; a sample's keys are read where they lie."""
    plain, fused = attention, copy.deepcopy(attention)
    report = patch(fused, ops=["cross_attention"])
    said = []
    for one in (plain, fused):
        cache = DynamicCache()
        with torch.no_grad():
            mask = masked("neighbours")[:samples]
            first = one(text(samples), images(samples), cache, mask)[0]
            steps = [one(text(samples)[:, n : n + 1], None, cache, mask[:, :, n : n + 1])[0] for n in range(1, WORDS)]
            several = one(text(samples)[:, :3], None, cache, mask[:, :, :3])[0]
        said.append([first, *steps, several])
    assert not report.fallbacks()
    torch.testing.assert_close(said[1], said[0], rtol=1e-5, atol=1e-6)


def test_a_second_image_joins_the_first_in_the_cache(attention):
    plain, fused = attention, copy.deepcopy(attention)
    report = patch(fused, ops=["cross_attention"])
    said = []
    for one in (plain, fused):
        cache = DynamicCache()
        one(text(), images(), cache, masked("neighbours"))
        both = masked([[[1] * 8, [1] * 6 + [0, 0], *[[0] * 4 + [1] * 4] * 3]] * 2)
        said.append(one(text(), draw(4, TOKENS, 48, seed=5), cache, both)[0])
        said[-1].square().sum().backward()  # with a cache that learns
        said.append(one.k_proj.weight.grad)
    assert not report.fallbacks()
    torch.testing.assert_close(said[2:], said[:2], rtol=1e-5, atol=1e-6)


def test_the_host_reads_a_mask_once_for_all_layers(monkeypatch):
    read, model = [], mllama()
    patch(model, ops=["cross_attention"])
    real = spans._read
    monkeypatch.setattr(spans, "_read", lambda *args: read.append(1) or real(*args))
    model(**mllama_batch())
    assert len(read) == 1 < sum(type(m).__name__ == "MllamaTextCrossAttention" for m in model.modules())


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda a, k: k.update(attention_mask=masked("no order")), "a word's keys are not neighbours"),
        (lambda a, k: k.update(attention_mask=masked("neighbours") / 2), "a word's keys are not neighbours"),
        (lambda a, k: k.update(attention_mask=masked("neighbours")[:1]), "its mask is (1, 1, 5, 42)"),
        (lambda a, k: k.update(is_causal=True), "it is called with options of SDPA"),
        (lambda a, k: setattr(a.config, "_attn_implementation", "eager"), "eager attention was asked for"),
        (lambda a, k: setattr(a.train(), "dropout", 0.1), "dropout in training"),
    ],
)
def test_what_the_operator_cannot_do_runs_transformers(attention, change, reason):
    arguments = {
        "hidden_states": text(), "cross_attention_states": images(), "attention_mask": masked("neighbours"),
    }  # fmt: skip
    change(attention, arguments)
    torch.manual_seed(0)
    expected = attention(**arguments)[0]
    report = patch(attention, ops=["cross_attention"])
    torch.manual_seed(0)
    assert torch.equal(attention(**arguments)[0], expected)
    assert report.fallbacks()[""] == {f"cross_attention: {reason}": 1}


def test_one_word_that_gains_nothing_runs_transformers(attention):
    """Putting a cache's keys in order for one word costs more than its mask does; over all keys there is no mask."""
    cache, mask = DynamicCache(), masked("padding between")
    report = patch(attention, ops=["cross_attention"])
    with torch.no_grad():
        attention(text(), images(), cache, mask)
        assert not report.fallbacks()
        attention(text()[:, :1], None, cache, mask[:, :, 1:2])
        attention(text()[:, :1], None, cache, mask[:, :, :1])
    assert report.fallbacks()[""] == {
        "cross_attention: a word's keys are not neighbours": 1, "cross_attention: a word sees every key": 1
    }  # fmt: skip


def test_a_mask_of_other_images_is_refused(attention):
    patch(attention, ops=["cross_attention"])
    with pytest.raises(ValueError, match="a mask of 42 keys is given for images of 35"):
        attention(text(1), images(1)[:5], None, masked("neighbours")[:1])


def test_an_empty_cache_is_transformers_error(attention):
    with pytest.raises(Exception) as theirs:
        attention(text(), None, DynamicCache(), None)
    patch(attention, ops=["cross_attention"])
    with pytest.raises(theirs.type):
        attention(text(), None, DynamicCache(), None)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}])
def test_generates_over_images_in_one_span(more):
    model, prompt = mllama(), mllama_prompt()
    prompt["cross_attention_mask"][0, :, 1] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **more}
    said = model.generate(**prompt, **options)
    report = patch(model, ops=["cross_attention"])
    assert torch.equal(model.generate(**prompt, **options), said)
    assert not report.fallbacks()


def test_under_autocast():
    model, batch = mllama(), mllama_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits
        report = patch(model, ops=["cross_attention"])
        torch.testing.assert_close(model(**batch).logits, expected, rtol=5e-2, atol=5e-2)
    assert not report.fallbacks()


def test_a_compiled_model_is_transformers(attention):
    expected = attention(text(), images(), None, masked("neighbours"))[0]
    patch(attention, ops=["cross_attention"])
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(text(), images(), None, masked("neighbours"))[0], expected)


def test_what_no_operator_takes_is_left(attention):
    assert TileAttention.refuses(attention) is None
    attention.head_dim = 160
    assert "160 wide" in TileAttention.refuses(attention)
    del attention.k_norm
    assert "other parts" in TileAttention.refuses(attention)
