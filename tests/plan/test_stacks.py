"""Stacks: their sizes are those of the published parts, and their policies cut and count as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_processors import processor
from pictures import image_sizes, picture
from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas

from fastmllm.data.resolution import POLICIES
from fastmllm.models.sizes import LANGUAGES, language_sizes
from fastmllm.plan.stacks import ALIASES, STACKS, find_stack

BILLIONS = {  # parameters, as the model cards say
    "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.544, "qwen2.5-3b": 3.086, "qwen2.5-7b": 7.616, "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76, "qwen2.5-72b": 72.71, "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.721, "qwen3-4b": 4.022,
    "qwen3-8b": 8.191, "qwen3-14b": 14.77, "qwen3-32b": 32.76, "llama-3.2-1b": 1.236, "llama-3.2-3b": 3.213,
    "llama-3.1-8b": 8.030, "llama-3.1-70b": 70.55, "vicuna-7b": 6.738, "vicuna-13b": 13.02, "mistral-7b": 7.248,
    "smollm2-135m": 0.1345, "smollm2-360m": 0.3618, "smollm2-1.7b": 1.711,
}  # fmt: skip
VISION = {  # millions of parameters of the towers; LLaVA's last block, which nothing reads, is not built
    "llava-1.5": 291, "llava-next": 291, "llava-onevision": 398, "internvl": 304, "idefics3": 413, "smolvlm": 86,
    "nanovlm": 86, "qwen2-vl": 631, "qwen2.5-vl": 632, "qwen3-vl": 416, "mllama": 864, "flamingo": 303, "blip-2": 986,
    "cogagent": 4584,
}  # fmt: skip
PROCESSORS = ("llava-1.5", "llava-next", "llava-onevision", "internvl", "idefics3", "smolvlm", "qwen2-vl",
              "qwen2.5-vl", "qwen3-vl")  # fmt: skip
MARKED = {"internvl": 2}  # a processor's count has the tokens around an image, too


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_language_model_has_its_published_size(name: str) -> None:
    parts = STACKS["llava-1.5"].build(name)
    count = sum(p.numel() for p in parts.language.parameters())
    assert count == pytest.approx(1e9 * BILLIONS[name], rel=2e-3)


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_has_its_tower_and_no_weights(name: str) -> None:
    model = STACKS[name].build("smollm2-135m")
    roles = model.roles()
    shapes = dict(model.named_parameters())
    assert round(sum(shapes[n].numel() for n in roles["vision"]) / 1e6) == VISION[name]
    assert all(p.is_meta for p in shapes.values())


def test_every_policy_has_a_stack() -> None:
    assert {type(stack.policy) for stack in STACKS.values()} == set(POLICIES.values())
    for name, kind in POLICIES.items():
        assert type(find_stack(name).policy) is kind
    assert set(ALIASES.values()) <= set(STACKS)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_thousand_sizes_count_as_transformers_counts(name: str) -> None:
    theirs, policy = processor(name), STACKS[name].policy
    sizes = image_sizes(1000, 3000, seed=len(name), ratio=30)
    found = theirs._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
    counts = [n - MARKED.get(name, 0) for n in found.num_image_tokens]
    if name in ("idefics3", "smolvlm"):  # many marks a tile
        counts = [theirs.image_seq_len * n for n in found.num_image_patches]
    assert [policy.plan(*size).llm_tokens for size in sizes] == counts


@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_become_as_many_tokens_of_a_whole_processor(name: str) -> None:
    theirs, policy = processor(name), STACKS[name].policy
    token = theirs.tokenizer.convert_tokens_to_ids(theirs.image_token)
    count = 3 if name == "smolvlm" else 20  # it enlarges each to 4 megapixels; its class is Idefics3's
    for width, height in image_sizes(count, 500, seed=3, ratio=20):
        batch = theirs(images=[picture(width, height)], text=f"{theirs.image_token} a", return_tensors="np")
        plan = policy.plan(width, height)
        assert int((batch["input_ids"] == token).sum()) == plan.llm_tokens, (width, height)
        if name == "internvl":
            assert len(batch["pixel_values"]) == len(plan.tiles)
        elif "image_grid_thw" in batch:
            assert len(batch["pixel_values"]) == plan.vit_tokens


def test_a_thousand_sizes_of_llama_vision() -> None:
    for width, height in image_sizes(1000, 3000, ratio=30):
        down, across = get_optimal_tiled_canvas(height, width, 4, 560)
        plan = STACKS["mllama"].policy.plan(width, height)
        assert plan.cross_tokens == down // 560 * (across // 560) * 1601
        assert plan.llm_tokens == 0


def test_a_policy_takes_other_sizes() -> None:
    assert find_stack("internvl:max_tiles=6").policy.plan(1920, 1080).grid == (1, 2)
    assert len(find_stack("InternVL:max_tiles=6,thumbnail=false").policy.plan(1920, 1080).tiles) == 2
    assert find_stack("qwen2.5-vl:max_pixels=1003520").policy.plan(2480, 3508).llm_tokens <= 1280
    with pytest.raises(ValueError, match=r"unknown policy 'internvl9'; choose one of llava-1\.5, llava-next"):
        find_stack("internvl9")
    with pytest.raises(ValueError, match="'max_tile=6' names no field=value of internvl: resample, image_size"):
        find_stack("internvl:max_tile=6")
    with pytest.raises(ValueError, match="internvl:max_tiles=many"):
        find_stack("internvl:max_tiles=many")


def test_a_language_model_may_be_a_folder(tmp_path: Path) -> None:
    inside = {**LANGUAGES["smollm2-135m"], "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(inside))
    assert STACKS["internvl"].build(tmp_path).language.config.depth == 2
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": inside}))
    assert language_sizes(tmp_path)["num_hidden_layers"] == 2
    assert language_sizes(tmp_path)["model_type"] == "llama"
    with pytest.raises(ValueError, match=r"unknown llm 'qwen9'; choose a folder with a config\.json or one of qwen2"):
        language_sizes("qwen9")
