"""Gate and residual of gated cross-attention layers."""

from __future__ import annotations

import pytest
import torch
from tiny_hf_fusion import idefics, idefics_batch, mllama, mllama_batch

from fastmllm.hf import patch
from fastmllm.hf.fused.gates import GatedLayer, MllamaGatedLayer


@pytest.mark.parametrize(
    "more", [{"alpha_type": "float"}, {"qk_layer_norms": False}, {"attn_implementation": "eager"}], ids=str
)
def test_other_gates_norms_and_attention(more):
    implementation = more.get("attn_implementation", "sdpa")
    model, batch = idefics(**{k: v for k, v in more.items() if k != "attn_implementation"}), idefics_batch()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = model(**batch).logits
        report = patch(model, ops=["gated_residual", "image_kv_cache"])
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert not report.fallbacks()


def test_dropout_runs_transformers():
    model = idefics()
    report = patch(model, ops=["gated_residual"])
    for layer in model.model.gated_cross_attn_layers:
        layer.config = 0.1
    model.train()(**idefics_batch())
    assert {reason for reasons in report.fallbacks().values() for reason in reasons} == {
        "gated_residual: dropout in training"
    }


@pytest.mark.parametrize(
    "build, batch, reentrant",
    [(idefics, idefics_batch, True), (idefics, idefics_batch, False), (mllama, mllama_batch, False)],
)  # reentrant, unpatched Mllama fails: its layers take the images by name, whose graph is walked twice
def test_gradient_checkpointing(build, batch, reentrant):
    found = []
    for patched in (False, True):
        model = build()
        if patched:
            patch(model, ops=["gated_residual", "image_kv_cache"])
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()(**batch()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_other_activations_are_left():
    layer = idefics().model.gated_cross_attn_layers[0]
    assert GatedLayer.refuses(layer) is None
    layer.act_cross_attn = torch.nn.Sigmoid()
    assert "Sigmoid, not Tanh" in GatedLayer.refuses(layer)


def test_a_cpu_gains_nothing():
    assert {GatedLayer, MllamaGatedLayer} == {
        fusion for fusion in (GatedLayer, MllamaGatedLayer)
        if "too little" in fusion.slower(None, torch.device("cpu"), torch.float32)
        and fusion.slower(None, torch.device("cuda"), torch.float32) is None
    }  # fmt: skip
