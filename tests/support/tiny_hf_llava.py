"""Tiny models of the LLaVA families, InternVL, PaliGemma and Gemma 3."""

from __future__ import annotations

import torch
import transformers as hf
from tiny_hf import BOS, CLIP, IMAGE, LLAMA, SIGLIP, VIDEO, Family, draw, finish, labelled, rows, text

TILES = {"image_size": 21, "patch_size": 7}  # 3 x 3 patches a tile
PINPOINTS = [[21, 42], [42, 21], [42, 42]]
# height and width of an image -> its tokens: a base tile, and rows of all tiles with a newline, padding cut off
LARGE, WIDE, NARROW = ((42, 42), 9 + 6 * 7), ((21, 42), 9 + 3 * 7), ((42, 8), 9 + 6 * 2)
SAID, MORE, LONG = [20, 21], [22, 23, 24], [25, 26, 27, 28, 29]


def llava():
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP), text_config=hf.LlamaConfig(**LLAMA), image_token_id=IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return finish(hf.LlavaForConditionalGeneration(config))


def llava_batch():
    batch = rows(text([20, 21], 16, [22, 23, 24], 16, [25, 26, 27, 28]), text(16, [30, 31, 32, 33, 34]))
    return labelled({"pixel_values": draw(3, 3, 28, 28), **batch})


def llava_prompt():
    return {"pixel_values": draw(2, 3, 28, 28), **rows(text([20], 16, [22]), text(16, [30, 31, 32]), side="left")}


def vipllava():
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP), text_config=hf.LlamaConfig(**LLAMA), image_token_id=IMAGE,
        vision_feature_layers=[-2, -3],
    )  # fmt: skip
    return finish(hf.VipLlavaForConditionalGeneration(config))


def llava_next():
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**{**CLIP, **TILES}), text_config=hf.LlamaConfig(**LLAMA),
        image_token_id=IMAGE, image_grid_pinpoints=PINPOINTS, vision_feature_layer=-2,
    )  # fmt: skip
    return finish(hf.LlavaNextForConditionalGeneration(config))


def _tiled(*images):
    """Return tiles and sizes; `images` are sizes and their tokens."""
    return {"pixel_values": draw(len(images), 5, 3, 21, 21), "image_sizes": torch.tensor([size for size, _ in images])}


def llava_next_batch():
    batch = rows(text(SAID, LARGE[1], MORE, NARROW[1], LONG), text(WIDE[1], LONG), text(SAID, LONG))
    return labelled({**_tiled(LARGE, NARROW, WIDE), **batch})


def llava_next_prompt():
    return {**_tiled(NARROW, WIDE), **rows(text(SAID, NARROW[1], MORE), text(WIDE[1], LONG), side="left")}


def llava_onevision():
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**{**SIGLIP, **TILES}), text_config=hf.Qwen2Config(**LLAMA),
        image_token_id=IMAGE, video_token_id=VIDEO, image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1,
    )  # fmt: skip
    return finish(hf.LlavaOnevisionForConditionalGeneration(config))


def llava_onevision_batch():  # an image among several is one tile and a newline; two frames are 2 x 2 tokens each
    video = [VIDEO] * (2 * 4 + 1)
    batch = rows(text(SAID, 10, MORE, 10, LONG), text(NARROW[1], MORE, video, LONG), text(SAID, LONG))
    images = {**_tiled(LARGE, WIDE, NARROW), "batch_num_images": torch.tensor([2, 1])}
    return labelled({**images, "pixel_values_videos": draw(1, 2, 3, 21, 21, seed=2), **batch})


def internvl():
    config = hf.InternVLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": [28, 28], "patch_size": [7, 7], "use_qk_norm": True, "attention_bias": True,
        },
        text_config={"model_type": "qwen2", **LLAMA}, image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip
    return finish(hf.InternVLForConditionalGeneration(config))


def internvl_batch():
    batch = rows(text(SAID, 4, MORE, 8, LONG), text(4, LONG), text(LONG))  # 8: two tiles of one image
    return labelled({"pixel_values": draw(4, 3, 28, 28), **batch})


def internvl_prompt():
    return {"pixel_values": draw(3, 3, 28, 28), **rows(text(SAID, 4, LONG), text(8, MORE), side="left")}


def paligemma():
    vision = {"model_type": "siglip_vision_model", "projection_dim": 48, **SIGLIP, **TILES}
    config = hf.PaliGemmaConfig(
        vision_config=vision, text_config={"model_type": "gemma", "head_dim": 12, **LLAMA}, image_token_id=IMAGE,
        projection_dim=48,
    )  # fmt: skip
    return finish(hf.PaliGemmaForConditionalGeneration(config))


def paligemma_batch():
    batch = labelled({"pixel_values": draw(3, 3, 21, 21), **rows(text(9, 9, SAID, [BOS], LONG), text(9, MORE, LONG))})
    scored = (batch["labels"] != -100) | (batch["attention_mask"] == 0)
    return {**batch, "token_type_ids": scored.long()}  # what is asked sees all of itself


def paligemma_prompt():
    batch = rows(text(9, 9, SAID), text(9, LONG), side="left")
    return {"pixel_values": draw(3, 3, 21, 21), **batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}


def gemma3():
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP}
    kinds = ["sliding_attention", "full_attention"]
    config = hf.Gemma3Config(
        vision_config=vision, text_config={"head_dim": 12, "sliding_window": 7, "layer_types": kinds, **LLAMA},
        image_token_id=IMAGE, mm_tokens_per_image=4,
    )  # fmt: skip
    return finish(hf.Gemma3ForConditionalGeneration(config))


def _of_images(batch):
    return {**batch, "token_type_ids": (batch["input_ids"] == IMAGE).long()}


def gemma3_batch():
    batch = rows(text(SAID, 4, MORE, 4, LONG), text(4, LONG), text(LONG))
    return labelled({"pixel_values": draw(3, 3, 28, 28), **_of_images(batch)})


def gemma3_prompt():
    return {"pixel_values": draw(2, 3, 28, 28), **_of_images(rows(text(SAID, 4, MORE), text(4, LONG), side="left"))}


OPS = frozenset({"patch_embed", "layer_norm", "rms_norm", "gelu_mlp", "insert_features", "linear_cross_entropy"})
FAMILIES = [
    Family(name=name, build=build, batch=batch, prompt=prompt, ops=OPS)
    for name, build, batch, prompt in (
        ("llava", llava, llava_batch, llava_prompt),
        ("vipllava", vipllava, llava_batch, llava_prompt),
        ("llava_next", llava_next, llava_next_batch, llava_next_prompt),
        ("llava_onevision", llava_onevision, llava_onevision_batch, llava_next_prompt),
        ("internvl", internvl, internvl_batch, internvl_prompt),
        ("paligemma", paligemma, paligemma_batch, paligemma_prompt),
        ("gemma3", gemma3, gemma3_batch, gemma3_prompt),
    )
]
