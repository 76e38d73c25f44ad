"""Tiny models of the LLaVA families."""

from __future__ import annotations

from tiny_hf import CLIP, IMAGE, LLAMA, Family, draw, finish, labelled, rows, text
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration


def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**LLAMA), image_token_id=IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return finish(LlavaForConditionalGeneration(config))


def llava_batch():
    batch = rows(text([20, 21], 16, [22, 23, 24], 16, [25, 26, 27, 28]), text(16, [30, 31, 32, 33, 34]))
    return labelled({"pixel_values": draw(3, 3, 28, 28), **batch})


def llava_prompt():
    return {"pixel_values": draw(2, 3, 28, 28), **rows(text([20], 16, [22]), text(16, [30, 31, 32]), side="left")}


FAMILIES = [
    Family(
        name="llava", build=llava, batch=llava_batch, prompt=llava_prompt,
        ops=frozenset({"patch_embed", "layer_norm", "rms_norm", "insert_features", "linear_cross_entropy"}),
    ),
]  # fmt: skip
