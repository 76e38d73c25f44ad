"""The loss of models whose head belongs to a language model inside of them."""

from __future__ import annotations

import pytest
import torch
from tiny_hf import IDS, VOCAB
from tiny_hf_fusion import blip2, blip2_batch, instructblip, instructblip_batch
from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config

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
    assert [row.reason for row in report.left] == ["its encoder-decoder computes the loss itself"]
