"""Tables of the fusion modules: every published name goes there and back, and configs refuse what is not computed."""

from __future__ import annotations

import pytest
import torch
from transformers import Idefics2Config, IdeficsConfig, MllamaConfig

from fastmllm.models.weights.fusion import (
    FLAMINGO_CROSS,
    IDEFICS2_CONNECTOR,
    IDEFICS_RESAMPLER,
    MLLAMA_CROSS,
    flamingo_resampler_rules,
    idefics2_resampler_config,
    idefics_cross_config,
    idefics_cross_rules,
    idefics_resampler_config,
    mllama_cross_config,
)
from fastmllm.models.weights.mapping import fill, to_ours, to_theirs
from fastmllm.modules.cross_attention import CrossAttentionConfig, GatedCrossAttention
from fastmllm.modules.resampler import PerceiverResampler, ResamplerConfig

D, DM = 8, 6
FLAMINGO = CrossAttentionConfig.flamingo(width=D, media_width=DM, num_heads=2, head_dim=4)
IDEFICS = CrossAttentionConfig.idefics(width=D, media_width=DM, num_heads=2, ffn_width=5, qk_norm=True)
VECTOR = CrossAttentionConfig.idefics(width=D, media_width=DM, num_heads=2, ffn_width=5, channel_gates=True)
MLLAMA = CrossAttentionConfig.mllama(width=D, num_heads=4, num_kv_heads=2, ffn_width=5)
FRAMED = ResamplerConfig.flamingo(width=D, num_latents=3, depth=11, num_heads=2, head_dim=4, max_frames=2, max_media=5)
RELU = ResamplerConfig.idefics(width=D, num_latents=3, depth=2, num_heads=2, head_dim=4, qk_norm=True)
GROUPED = ResamplerConfig.idefics2(
    width=D, num_latents=3, depth=2, num_heads=4, num_kv_heads=2, head_dim=4, media_width=DM, projection_width=7
)


@pytest.mark.parametrize(
    ("model", "rules", "shapes"),
    [  # some names and shapes of each published layout; the other ones are held by the oracles in tests/modules
        (GatedCrossAttention(FLAMINGO), FLAMINGO_CROSS,
         {"attn.to_kv.weight": (16, DM), "ff.0.bias": (D,), "ff.3.weight": (D, 4 * D), "ff_gate": (1,)}),
        (GatedCrossAttention(IDEFICS), idefics_cross_rules(IDEFICS),
         {"alpha_dense": (1,), "cross_attn.v_proj.weight": (D, DM), "cross_attn.k_layer_norm.weight": (4,)}),
        (GatedCrossAttention(VECTOR), idefics_cross_rules(VECTOR),
         {"alpha_dense": (1, 1, D), "alpha_cross_attn": (1, 1, D), "mlp.gate_proj.weight": (5, D)}),
        (GatedCrossAttention(MLLAMA), MLLAMA_CROSS,
         {"cross_attn_mlp_gate": (1,), "cross_attn.k_proj.weight": (4, D), "cross_attn.q_norm.weight": (2,)}),
        (PerceiverResampler(FRAMED), flamingo_resampler_rules(FRAMED),
         {"frame_embs": (2, D), "media_time_embs": (5, 1, D), "layers.10.0.norm_media.bias": (D,),
          "layers.10.1.1.weight": (4 * D, D), "norm.weight": (D,)}),
        (PerceiverResampler(RELU), IDEFICS_RESAMPLER,
         {"blocks.1.0.output_proj.weight": (D, 8), "blocks.0.1.c_proj.weight": (D, 4 * D), "layer_norm.bias": (D,)}),
        (PerceiverResampler(GROUPED), IDEFICS2_CONNECTOR,
         {"modality_projection.up_proj.weight": (7, DM), "perceiver_resampler.layers.1.self_attn.v_proj.weight": (8, D),
          "perceiver_resampler.layers.0.input_context_norm.weight": (D,), "perceiver_resampler.latents": (3, D)}),
    ],
    ids=["flamingo", "idefics", "idefics-vector", "mllama", "flamingo-resampler", "idefics-resampler", "idefics2"],
)  # fmt: skip
def test_there_and_back_is_the_same_bit_for_bit(model, rules, shapes):
    theirs = {n: torch.randn_like(t) for n, t in to_theirs(model.state_dict(), rules).items()}
    assert {n: tuple(theirs[n].shape) for n in shapes} == shapes
    ours, rest = to_ours(theirs, rules, "a checkpoint")
    assert not rest
    fill(model, ours, "a checkpoint")
    back = to_theirs(model.state_dict(), rules)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[n], theirs[n]) for n in theirs)


def test_defaults_are_those_of_transformers():
    idefics = IdeficsConfig().to_dict()
    assert idefics_cross_config({}) == idefics_cross_config(idefics)
    assert idefics_resampler_config({}) is None
    assert idefics_resampler_config(idefics) is None
    assert idefics_resampler_config({"use_resampler": True}) == idefics_resampler_config(
        {**idefics, "use_resampler": True}
    )
    assert mllama_cross_config({}) == mllama_cross_config(MllamaConfig().to_dict()["text_config"])
    assert idefics2_resampler_config({}) == idefics2_resampler_config(Idefics2Config().to_dict())


@pytest.mark.parametrize(
    ("read", "raw", "message"),
    [
        (idefics_cross_config, {"hidden_act": "gelu"}, "Idefics: hidden_act 'gelu' is not computed here"),
        (idefics_cross_config, {"dropout": 0.1}, r"Idefics: dropout 0\.1"),
        (idefics_cross_config, {"alpha_type": "matrix"}, "alpha_type 'matrix' is not computed here"),
        (mllama_cross_config, {"hidden_act": "relu"}, "Mllama: hidden_act 'relu'"),
        (mllama_cross_config, {"dropout": 0.5}, r"Mllama: dropout 0\.5"),
        (
            idefics2_resampler_config,
            {"perceiver_config": {"hidden_act": "gelu"}},
            "perceiver_config\\): hidden_act 'gelu'",
        ),
        (
            idefics2_resampler_config,
            {"perceiver_config": {"attention_dropout": 0.1}},
            r"perceiver_config\): attention_dropout",
        ),
        (idefics2_resampler_config, {"text_config": {"hidden_act": "gelu"}}, "text_config\\): hidden_act 'gelu'"),
    ],
)
def test_what_is_not_computed_here_is_refused(read, raw, message):
    with pytest.raises(ValueError, match=message):
        read(raw)
