"""What a family's checkpoint or batch may not be: each is refused by name, and no code of a checkpoint runs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from fastmllm.models.families import (
    FAMILIES,
    any_resolution,
    blip2,
    build,
    composed,
    idefics,
    internvl,
    llava,
    mllama,
    qwen_vl,
)
from fastmllm.models.families.parts import cut
from fastmllm.models.mllm import MLLM
from tests.support.tiny_mllm import alone, oracle


@pytest.fixture
def copied(saved, tmp_path):
    """Give a function: name -> a copy of its folder, to be spoilt."""

    def copy(name):
        shutil.copytree(saved(name), tmp_path / name)
        return tmp_path / name

    return copy


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_every_family_has_its_file():
    files = {
        m.__name__.rsplit(".", 1)[-1]
        for m in (any_resolution, blip2, composed, idefics, internvl, llava, mllama, qwen_vl)
    }
    assert set(FAMILIES.values()) == files


def _spoil(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


FIRST = "multi_modal_projector.linear_1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(FIRST), r"lacks: multi_modal_projector\.linear_1"),
        (lambda s: s.pop("vision_tower.encoder.layers.0.self_attn.k_proj.weight"), r"lacks .*k_proj\.weight"),
        (lambda s: s.update(surprise=torch.ones(2)), r"nothing here computes with: surprise"),
        (lambda s: s.update({FIRST: s[FIRST][:-1].clone()}), r"other shapes .*multi_modal_projector\.linear_1\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copied, change, message):
    folder = copied("llava")
    _spoil(folder, change)
    with pytest.raises(ValueError, match=message):
        MLLM.from_pretrained(folder)


def test_a_truncated_file_and_a_missing_one_are_named(copied):
    folder = copied("llava")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        MLLM.from_pretrained(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        MLLM.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        MLLM.from_pretrained(folder / "nowhere")


def test_code_beside_the_weights_never_runs(copied):
    folder = copied("llava")
    (folder / "modeling_llava.py").write_text("raise SystemExit('ran')")
    raw = config_of(folder) | {"auto_map": {"AutoModel": "modeling_llava.Llava"}}
    (folder / "config.json").write_text(json.dumps(raw))
    model = MLLM.from_pretrained(folder)
    model.save_pretrained(folder.parent / "out")
    assert not (folder.parent / "out" / "modeling_llava.py").exists()


def test_older_names_are_read_and_written_as_they_were(saved, tmp_path):
    """transformers 4 wrote vision_tower.vision_model.…"""
    shutil.copytree(saved("llava"), tmp_path / "old")
    _spoil(tmp_path / "old", lambda s: [
        s.update({n.replace("vision_tower.", "vision_tower.vision_model."): s.pop(n)})
        for n in list(s) if n.startswith("vision_tower.")
    ])  # fmt: skip
    model = MLLM.from_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "new")
    old, new = (load_file(tmp_path / at / "model.safetensors") for at in ("old", "new"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_files_of_the_processor_go_along(copied, tmp_path):
    folder = copied("llava")
    (folder / "tokenizer.json").write_text("{}")
    MLLM.from_pretrained(folder).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_dtype_and_gradients(saved):
    model = MLLM.from_pretrained(saved("llava"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = oracle("llava")[1]
    batch = {**batch, "labels": batch["input_ids"], "pixel_values": batch["pixel_values"].bfloat16()}
    model(model.inputs(batch)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava", {"vision_feature_select_strategy": "full"}, "'full' keeps the class token"),
        ("llava", {"vision_config": {"model_type": "pixtral"}}, "model_type 'pixtral' is none of"),
        ("llava_onevision", {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio 'pad'"),
        ("internvl", {"vision_feature_layer": [1, 2]}, r"several vision_feature_layer \(1, 2\)"),
        ("blip2", {"text_config": {"model_type": "t5"}}, "a T5 behind the Q-Former"),
        ("blip2", {"image_token_index": None}, "no image_token_index"),
        ("idefics", {"alpha_type": "none"}, "alpha_type 'none'"),
        ("llava", {"text_config": {"model_type": "gpt2"}}, "model_type 'gpt2'"),
    ],
)
def test_variants_that_are_not_computed_are_named(saved, name, change, message):
    with pytest.raises(ValueError, match=message):
        build(config_of(saved(name)) | change, "a checkpoint")


def test_a_config_without_a_part_is_named(saved):
    raw = config_of(saved("llava"))
    del raw["vision_config"]
    with pytest.raises(ValueError, match="a checkpoint lacks 'vision_config'"):
        build(raw, "a checkpoint")


def _without(batch, *names):
    return {k: v for k, v in batch.items() if k not in names}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava", lambda b: {**b, "pixel_values": b["pixel_values"][:1]}, "sample 1 has 16 image placeholders"),
        ("llava", lambda b: {**b, "pixel_values": b["pixel_values"][0]}, r"must be \(n, 3, H, W\)"),
        ("llava", lambda b: {**b, "pixel_values": b["pixel_values"][..., :27]}, "no multiples of the patch size 7"),
        ("llava_next", lambda b: _without(b, "image_sizes"), "pixel_values come with image_sizes"),
        (
            "llava_next",
            lambda b: {**b, "pixel_values": b["pixel_values"].flatten(0, 1)[:3]},
            "3 tiles, but images of",
        ),
        ("llava_onevision", lambda b: {**b, "pixel_values_videos": b["pixel_values"]}, "videos are not packed"),
        (
            "llava_onevision",
            lambda b: {**b, "batch_num_images": torch.tensor([2, 1])},
            r"batch_num_images \[2, 1\] name 3 images, but image_sizes 2",
        ),
        ("llava_next", lambda b: {**b, "pixel_values": b["pixel_values"][:1]}, "1 pixel_values, but image_sizes of 2"),
        ("idefics", lambda b: {**b, "pixel_values": b["pixel_values"][:1]}, "of 1 samples, but input_ids of 2"),
        ("mllama", lambda b: {**b, "aspect_ratio_ids": b["aspect_ratio_ids"][:1]}, r"aspect_ratio_ids \(1, 1\) must"),
        ("qwen2_5_vl", lambda b: _without(b, "pixel_values"), "image_grid_thw without pixel_values: give both"),
        (
            "qwen2_5_vl",
            lambda b: {
                **b,
                "input_ids": b["input_ids"].index_put((torch.tensor([0]), torch.tensor([7])), torch.tensor(6)),
            },
            "token 6 stands among the 5 of another image",
        ),
        ("instructblip", lambda b: _without(b, "qformer_input_ids"), "give qformer_input_ids"),
        ("idefics", lambda b: _without(b, "image_attention_mask"), r"image_attention_mask None must be \(B, L, I\)"),
        ("mllama", lambda b: _without(b, "cross_attention_mask"), "come with cross_attention_mask"),
        (
            "mllama",
            lambda b: {**b, "cross_attention_mask": b["cross_attention_mask"][..., :2]},
            "must be .B, L, I, tiles",
        ),
        ("qwen2_5_vl", lambda b: _without(b, "image_grid_thw"), "pixel_values come with image_grid_thw"),
        ("qwen2_5_vl", lambda b: {**b, "pixel_values": b["pixel_values"][1:]}, "image_grid_thw has"),
        (
            "qwen2_5_vl",
            lambda b: {**b, "input_ids": b["input_ids"].masked_fill(b["input_ids"] == 5, 9)},
            "do not fit the",
        ),
    ],
)
def test_batches_that_do_not_fit_are_named(saved, name, change, message):
    model = MLLM.from_pretrained(saved(name))
    with pytest.raises(ValueError, match=message):
        model.inputs(change(oracle(name)[1]))


def test_tiles_that_are_not_neighbours_are_refused(saved):
    model = MLLM.from_pretrained(saved("mllama"))
    batch = alone("mllama", 0)
    seen = torch.zeros_like(batch["cross_attention_mask"])
    seen[:, :, :, [0, 2]] = 1
    batch = {**batch, "cross_attention_mask": seen, "aspect_ratio_ids": torch.tensor([[6]])}  # 2 x 2 tiles
    with pytest.raises(ValueError, match="not neighbours"):
        model.inputs(batch)
    idefics_model = MLLM.from_pretrained(saved("idefics"))
    batch = oracle("idefics")[1]
    pixels = torch.cat([batch["pixel_values"], batch["pixel_values"][:, :1]], 1)
    seen = torch.ones(*batch["input_ids"].shape, 3, dtype=torch.long)
    seen[0, 4, 1] = 0
    with pytest.raises(ValueError, match="not neighbours"):
        idefics_model.inputs({**batch, "pixel_values": pixels, "image_attention_mask": seen})


def test_cut_is_what_the_patch_matrix_reads():
    pixels = torch.randn(2, 3, 4, 6)
    patches = cut(pixels, 2)
    assert patches.shape == (2 * 2 * 3, 12)
    assert torch.equal(patches[4].view(2, 2, 3), pixels[0, :, 2:4, 2:4].permute(1, 2, 0))
