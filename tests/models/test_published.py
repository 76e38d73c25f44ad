"""Compositions that are a family of transformers: written so that transformers computes the same logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from fastmllm.models.composition import ConnectorSizes, MLLMConfig, ResolutionSizes
from fastmllm.models.language import LanguageConfig
from fastmllm.models.mllama_vision import MllamaVisionConfig
from fastmllm.models.mllm import MLLM
from fastmllm.models.qwen_vision import QwenVisionConfig
from fastmllm.models.vision import VisionConfig
from tests.support.tiny_compositions import picture, redrawn
from tests.support.tiny_mllm import CLIP, IMAGE, MODELS, PINPOINTS, SIGLIP, TEXT, VOCAB

HALF = {"pixel_mean": (0.5,) * 3, "pixel_std": (0.5,) * 3}
CLIP_PIXELS = {"pixel_mean": (0.48145466, 0.4578275, 0.40821073), "pixel_std": (0.26862954, 0.26130258, 0.27577711)}
LLAMA = LanguageConfig(
    vocab_size=VOCAB, width=48, depth=2, num_heads=4, num_kv_heads=2, head_dim=12, mlp_width=96, max_positions=256
)
QWEN2 = replace(LLAMA, qkv_bias=True)
QWEN_VL = replace(QWEN2, mrope_section=(2, 2, 2))
PLAIN = VisionConfig(width=32, depth=2, num_heads=4, mlp_ratio=2.0, patch_size=7, image_size=28, layer_scale=None)
CLIP_VIT = replace(
    PLAIN, activation="quick_gelu", norm_eps=1e-5, patch_bias=False, pre_norm=True, final_norm=False, **CLIP_PIXELS
)
SIGLIP_VIT = replace(PLAIN, activation="gelu_tanh", cls_token=False, final_norm=False, **HALF)
INTERN_VIT = replace(PLAIN, qk_norm=True, layer_scale=0.1, final_norm=False)
QWEN_TOWER = QwenVisionConfig(
    width=32, depth=3, num_heads=4, mlp_width=44, out_width=48, patch_size=4, window=2, full_layers=(1,)
)
CANVASES = ResolutionSizes(pinpoints=tuple(map(tuple, PINPOINTS)))
BASE = {"image_token_id": IMAGE, "resolution_sizes": ResolutionSizes(min_pixels=64, max_pixels=600)}
CONFIGS = {
    "llava": MLLMConfig(encoder=replace(CLIP_VIT, depth=3, layer=-2), language=LLAMA, **BASE),
    "llava_next": MLLMConfig(
        encoder=replace(CLIP_VIT, depth=3, layer=-2), language=LLAMA, resolution="anyres",
        **{**BASE, "resolution_sizes": CANVASES},
    ),
    "llava_onevision": MLLMConfig(
        encoder=SIGLIP_VIT, language=QWEN2, resolution="anyres",
        **{**BASE, "resolution_sizes": replace(CANVASES, max_tiles=2)},
    ),
    "internvl": MLLMConfig(
        encoder=INTERN_VIT, language=QWEN2, resolution="tiles", connector="pixel_shuffle", **BASE
    ),
    "idefics": MLLMConfig(
        encoder=replace(CLIP_VIT, activation="gelu", resample="none"), connector="resampler", fusion="idefics",
        language=replace(LLAMA, depth=4, num_kv_heads=4), cross_every=2,
        connector_sizes=ConnectorSizes(tokens=4, depth=2, num_heads=4, head_dim=8), **BASE,
    ),
    "mllama": MLLMConfig(
        encoder=MllamaVisionConfig(
            width=32, depth=3, global_depth=2, num_heads=4, mlp_width=64, layers=(0, 2), tile_size=28, patch_size=7
        ),
        language=replace(LLAMA, extra_embeddings=8, rope_theta=500000.0), resolution="mllama", connector="none",
        fusion="mllama", cross_layers=(1, 2), **BASE,
    ),
    "qwen2_vl": MLLMConfig(
        encoder=replace(
            QWEN_TOWER, depth=2, mlp_width=64, norm="layer", activation="quick_gelu", window=None, full_layers=()
        ),
        language=QWEN_VL, resolution="native", connector="merger", **BASE,
    ),
    "qwen2_5_vl": MLLMConfig(
        encoder=QWEN_TOWER, language=QWEN_VL, resolution="native", connector="merger", **BASE
    ),
    "qwen3_vl": MLLMConfig(
        encoder=replace(
            QWEN_TOWER, norm="layer", activation="gelu_tanh", patch_bias=True, position_grid=4, window=None,
            full_layers=(), deepstack_layers=(0, 1), **HALF,
        ),
        language=replace(LLAMA, qk_norm=True, mrope_section=(2, 2, 2), mrope_interleaved=True),
        resolution="native", connector="merger", fusion="deepstack", **BASE,
    ),
}  # fmt: skip


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def samples():
    return [[1, picture(0), 10, 11, picture(1, 24, 16), 12], [1, 20, picture(2, 16, 16), 21]]


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_is_saved_with_the_same_logits(name, tmp_path):
    model = redrawn(CONFIGS[name])
    model.save_pretrained(tmp_path)
    oracle, batch = MODELS[name]()
    assert model.checkpoint.raw["architectures"] == [type(oracle).__name__]
    theirs, report = type(oracle).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert theirs.config.model_type == name
    assert not any(report.values()), report
    with torch.no_grad():
        expected = theirs.eval()(**batch).logits[batch["attention_mask"].bool()]
        assert relative(model.logits(model.inputs(batch)), expected) <= 1e-5
        again = MLLM.from_pretrained(tmp_path)
        assert again.packing == model.packing
        assert torch.equal(again.logits(again.pack(samples())), model.logits(model.pack(samples())))


def test_an_encoder_without_a_class_token_keeps_its_first_patch(tmp_path):
    """transformers drops the first row of a LLaVA's features, whatever it is, unless the strategy is "full"."""
    model = redrawn(replace(CONFIGS["llava"], encoder=replace(SIGLIP_VIT, depth=3, layer=-2)))
    model.save_pretrained(tmp_path)
    oracle, batch = MODELS["llava"]()
    theirs = type(oracle).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(**batch).logits[batch["attention_mask"].bool()]
        assert relative(model.logits(model.inputs(batch)), expected) <= 1e-5


def normalised(tiles, config):
    return ((tiles / 255 - torch.tensor(config.pixel_mean)) / torch.tensor(config.pixel_std)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mllama"])
def test_pack_gives_what_a_processor_gives(name):
    model, image = redrawn(CONFIGS[name]), picture(3, 28, 56)
    policy = model.packing.policy
    plan, (tiles,) = policy.plan(56, 28), policy.apply(image)
    count = 1 if name == "mllama" else plan.llm_tokens
    batch = {"input_ids": torch.tensor([[1, 9, *[IMAGE] * count, 10, 11]])}
    if name == "llava":
        batch["pixel_values"] = normalised(tiles, model.images.vision.config)
    elif name == "mllama":
        values = torch.zeros(1, 1, 4, 3, 28, 28)
        values[0, 0, : len(tiles)] = normalised(tiles, model.images.vision.config)
        seen = torch.zeros(1, 5, 1, 4)
        seen[:, 2:, :, : len(tiles)] = 1
        batch |= {"pixel_values": values, "aspect_ratio_ids": torch.tensor([[2]]), "cross_attention_mask": seen}
        assert plan.grid == (1, 2)
    else:
        _, h, w = plan.grid_thw
        x = normalised(tiles, model.images.vision.config)[0].reshape(3, h // 2, 2, 4, w // 2, 2, 4)
        x = x.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1)
        batch |= {"pixel_values": x.reshape(h * w, -1), "image_grid_thw": torch.tensor([[1, h, w]])}
    with torch.no_grad():
        mine = model.logits(model.pack([[1, 9, image, 10, 11]]))
        assert relative(mine, model.logits(model.inputs(batch))) <= 2e-6


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llava", {"language": replace(LLAMA, qkv_bias=True, qk_norm=True)}),
        ("llava", {"encoder": replace(CLIP_VIT, norm_eps=1e-4, pixel_mean=(0.5,) * 3)}),
        ("llava", {"connector": "pixel_shuffle"}),
        ("internvl", {"resolution": "fixed"}),
        ("idefics", {"cross_layers": (1, 3)}),
        ("mllama", {"language": replace(LLAMA, rope_theta=500000.0)}),
        ("qwen2_5_vl", {"language": LLAMA}),
    ],
)
def test_what_no_family_computes_is_written_in_our_own_layout(name, changes):
    assert MLLM.from_config(CONFIGS[name]).checkpoint.raw["model_type"] == name
    model = MLLM.from_config(replace(CONFIGS[name], **changes))
    assert model.checkpoint.raw["model_type"] == "fastmllm"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": {"name": "panorama"}}, "panorama"),
        ({"resolution": {"name": "fixed", "sides": 3}}, "sides"),
        ({"resolution": {"name": "fixed", "fit": "tear"}}, "fit 'tear' must be one of"),
        ({"resolution": 3}, "is no resolution policy"),
        ({"image_token_id": None}, "is no resolution policy"),
    ],
)
def test_a_spoilt_policy_is_named(change, message, tmp_path):
    model = MLLM.from_config(CONFIGS["llava"])
    model.checkpoint.raw["fastmllm"] |= change
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MLLM.from_pretrained(tmp_path)


def test_the_tiny_towers_are_those_of_the_batches():
    assert (CLIP["image_size"], SIGLIP["image_size"], TEXT["hidden_size"]) == (28, 28, LLAMA.width)
