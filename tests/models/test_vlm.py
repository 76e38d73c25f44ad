"""VLM: visual tokens stand where they belong, samples do not see each other, the loss is what its parts say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_vlm import colour_photos, tiny_vlm

from fastmllm.compression import METHODS, Placement, compress
from fastmllm.data.images import load_image
from fastmllm.data.sample import Sample
from fastmllm.data.text import ChatTemplate
from fastmllm.infer.respond import collate_for
from fastmllm.models.features import FeatureCache
from fastmllm.models.talk import TalkConfig
from fastmllm.models.vlm import ModelConfig


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return colour_photos(tmp_path_factory.mktemp("photos"), count=2)


def _samples(photos):
    return [
        Sample(id=name, prompt="What is this?", answer=name, task="name", image=str(photos / "train" / name / "0.png"))
        for name in ("red", "blue")
    ] + [Sample(id="text", prompt="Say yes", answer="yes", task="chat")]


def _batch(model, samples, keep=4, pixels=True):
    return collate_for(model, samples, keep=keep, image_size=32, load_pixels=pixels, with_answers=True)


def test_visual_tokens_take_the_image_places(photos):
    model = tiny_vlm()
    batch = _batch(model, _samples(photos))
    embedded = model.embed_batch(batch)
    tokens = model.connector(compress(model.encode_images(batch.pixels), "pool", keep=4))
    torch.testing.assert_close(embedded[batch.image_index], tokens.flatten(0, 1))
    words = torch.ones(len(batch.input_ids), dtype=torch.bool)
    words[batch.image_index] = False
    torch.testing.assert_close(embedded[words], model.language.embed(batch.input_ids[words]))


def test_loss_is_the_sum_over_answers_and_over_samples(photos):
    model = tiny_vlm()
    samples = _samples(photos)
    batch = _batch(model, samples)
    hidden = model.language(model.embed_batch(batch), batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    want = F.cross_entropy(model.language.logits(hidden), batch.labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(model(batch), want, rtol=1e-5, atol=1e-5)
    alone = sum(model(_batch(model, [s])) for s in samples)
    torch.testing.assert_close(model(batch), alone, rtol=1e-5, atol=1e-5)


def test_the_image_matters_and_only_to_its_own_sample(photos):
    model = tiny_vlm()
    batch = _batch(model, _samples(photos))
    before = model(batch)
    batch.pixels = batch.pixels.flip(0)  # swap the two images
    assert not torch.isclose(before, model(batch))
    rows = slice(batch.cu_seqlens[2], None)
    text = model.embed_batch(batch)[rows]
    batch.pixels = batch.pixels.flip(0)
    torch.testing.assert_close(text, model.embed_batch(batch)[rows])


@pytest.mark.parametrize("method", ["pool", "bipartite_merge"])
@pytest.mark.parametrize("keep", [1, 4, 16])
def test_gradients_reach_the_connector(photos, method, keep):
    model = tiny_vlm()
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    object.__setattr__(model.config, "compress", method)
    model(_batch(model, _samples(photos), keep=keep)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.connector.parameters())
    assert all(p.grad is None for p in (*model.vision.parameters(), *model.language.parameters()))


def test_text_only_batches_still_run_the_connector(photos):
    """Ranks must gather sharded parameters in step, image or not."""
    model = tiny_vlm().train()
    batch = _batch(model, _samples(photos)[2:])
    assert batch.pixels is None
    model(batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.connector.parameters())
    calls = []
    model.eval().vision.register_forward_hook(lambda *_: calls.append(1))
    alone = model(batch)
    assert calls == []
    for param in model.vision.parameters():
        param.ds_id = 0  # as under ZeRO-3, where a validation must keep step too
    assert torch.equal(model(batch), alone)
    assert len(calls) == 1


def test_cached_features_give_the_same_loss(photos, tmp_path):
    model = tiny_vlm()
    samples = _samples(photos)
    want = model(_batch(model, samples))
    with pytest.raises(ValueError, match="no feature_cache is set"):
        model(_batch(model, samples, pixels=False))
    model.feature_cache = FeatureCache(model.vision, 32, load_image, tmp_path).add(s.image for s in samples if s.image)
    torch.testing.assert_close(model(_batch(model, samples, pixels=False)), want)


def test_placeholders_must_divide_among_the_images(photos):
    model = tiny_vlm()
    batch = _batch(model, _samples(photos))
    batch.image_index = batch.image_index[:-1]
    with pytest.raises(ValueError, match="7 image places do not fit 2 images"):
        model(batch)


def test_config_rejects_nonsense():
    with pytest.raises(ValueError, match="must be positive"):
        ModelConfig(visual_tokens=0)


def test_a_trained_compressor_runs_on_text_alone_and_in_the_model_s_dtype(photos):
    model = tiny_vlm()
    model.config = replace(model.config, visual_tokens=4)
    model.to(torch.bfloat16)
    model.placement = Placement.of("connector", METHODS["attend"], 4, design="mqt", width=24, width_out=24, num_heads=2)
    model.requires_grad_(True).train()
    texts = [replace(s, image=None) for s in _samples(photos)]
    model(collate_for(model, texts, keep=4, image_size=32, load_pixels=True, with_answers=True)).backward()
    missing = [n for n, p in model.compressors.named_parameters() if p.grad is None or p.dtype != torch.bfloat16]
    assert not missing


def test_a_decoder_s_reduction_knows_the_encoder_s_grid(photos):
    model = tiny_vlm()
    batch = collate_for(model, _samples(photos), keep=16, image_size=32, load_pixels=True, with_answers=True)
    model.placement = Placement.of("language:0", METHODS["topk"], 4, scorer="grid")
    model(batch)
    reduction = model._reduction(batch)
    assert reduction.visual.grid[0] == (1, 4, 4)


def _shared(photos):
    """One image with two answers, another one, and text."""
    red, blue, text = _samples(photos)
    return [red, replace(red, id="wrong", answer="green"), blue, text]


def test_an_image_is_encoded_once_for_all_who_show_it(photos, monkeypatch):
    model = tiny_vlm()
    samples, seen = _shared(photos), []
    encode = model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    batch = _batch(model, samples)
    together = model.log_probs(batch)
    assert seen == [2]
    alone = torch.cat([model.log_probs(_batch(model, [s])) for s in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-together.sum(), model(batch), rtol=1e-5, atol=1e-5)
    model.connector.zero_grad()
    together.sum().backward()
    got = [p.grad.clone() for p in model.connector.parameters()]
    model.connector.zero_grad()
    alone.sum().backward()
    for one, two in zip(got, model.connector.parameters(), strict=True):
        torch.testing.assert_close(one, two.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [None, "language:1"])
def test_log_probabilities_of_scored_tokens_in_their_order(photos, place):
    model = tiny_vlm()
    if place is not None:
        model.placement = Placement.of(place, METHODS["topk"], 0.1, scorer="last_row")
    batch = _batch(model, _shared(photos), keep=16)  # boundaries move by more than an answer
    tokens = model.target_log_probs(batch)
    counts = [int((row != -100).sum()) for row in batch.labels.split(batch.cu_seqlens.diff().tolist())]
    assert tokens.shape == (batch.num_targets,)
    sums = torch.stack([part.sum() for part in tokens.split(counts)])
    torch.testing.assert_close(sums, model.log_probs(batch), rtol=1e-5, atol=1e-5)
    if place is None:
        logits = model.language.logits(model.start(batch)[0]).log_softmax(-1)
        rows = (batch.labels != -100).nonzero().view(-1)
        torch.testing.assert_close(tokens, logits[rows, batch.labels[rows]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [ModelConfig, partial(TalkConfig, folder="published")])
def test_a_models_words_are_a_chat_template(make) -> None:
    """One template, with defaults of its own: what a recipe leaves out, and what no template may say."""
    config = make(suffix="<end>")
    assert isinstance(config, ChatTemplate)
    assert (config.suffix, config.prefix) == ("<end>", make().prefix)
    with pytest.raises(ValueError, match=r"must have one \{\}"):
        make(system="no place")
