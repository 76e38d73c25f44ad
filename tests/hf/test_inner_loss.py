"""The loss of models whose head belongs to a language model inside of them."""

from __future__ import annotations

import pytest
import torch
from tiny_hf import IDS, VOCAB, finish
from tiny_hf_fusion import blip2, blip2_batch, instructblip, instructblip_batch
from transformers import Blip2Config, Blip2ForConditionalGeneration, GraniteConfig, T5Config

from fastmllm.hf import patch
from fastmllm.hf.fused.inner_loss import InnerHeadLoss


@pytest.mark.parametrize("build, batch", [(blip2, blip2_batch), (instructblip, instructblip_batch)])
@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(7)}], ids=str)
def test_equals_transformers_loss(build, batch, more):
    model = build().train()
    expected = model(**batch(), **more).loss
    report = patch(model, ops=["linear_cross_entropy"])
    found = model(**batch(), **more)
    torch.testing.assert_close(found.loss, expected)
    assert found.logits is None
    assert not report.fallbacks()


def test_labels_of_the_end_only_run_transformers():
    model, batch = blip2().train(), {name: t[:1] for name, t in blip2_batch().items()}  # BLIP-2 takes one row so
    batch["pixel_values"], batch["labels"] = blip2_batch()["pixel_values"][:2], batch["labels"][:, -8:]
    expected = model(**batch).loss
    report = patch(model, ops=["linear_cross_entropy"])
    assert torch.equal(model(**batch).loss, expected)
    assert sum(report.fallbacks()[""].values()) == 1


def test_an_encoder_decoder_is_left():
    text = T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, **IDS)
    small = blip2().config
    config = Blip2Config(
        vision_config=small.vision_config, qformer_config=small.qformer_config, text_config=text, num_query_tokens=2
    )
    assert InnerHeadLoss.refuses(blip2()) is None
    report = patch(Blip2ForConditionalGeneration(config), ops=["linear_cross_entropy"])
    assert "its encoder-decoder computes the loss itself" in [row.reason for row in report.left]


def test_a_decoder_that_scales_its_logits_is_left():
    small = blip2().config
    text = GraniteConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=8.0, **IDS,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=small.vision_config, qformer_config=small.qformer_config, text_config=text, num_query_tokens=8,
        image_token_index=small.image_token_index,
    )  # fmt: skip
    model, batch = finish(Blip2ForConditionalGeneration(config)).train(), blip2_batch()
    expected = model(**batch).loss
    report = patch(model, ops=["linear_cross_entropy"])
    assert any("GraniteForCausalLM" in row.reason for row in report.left)
    assert torch.equal(model(**batch).loss, expected)
