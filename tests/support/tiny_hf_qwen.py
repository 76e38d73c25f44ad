"""Tiny models of Qwen-VL, and batches of images of several sizes, a video, and a row without either."""

from __future__ import annotations

import torch
from tiny_hf import IMAGE, LLAMA, VIDEO, Family, draw, finish, labelled, rows, text
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)  # fmt: skip

ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}  # heads of 12 turn 6 pairs
TEXT = {**LLAMA, "rope_parameters": ROPE}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 7, "vision_end_token_id": 8}
TOWER = {"num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2, **TOWER}
    return finish(Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, text_config=TEXT, **TOKENS)))


def qwen2_5_vl():
    vision = {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 44, "window_size": 16,
        "fullatt_block_indexes": [1], **TOWER,
    }  # fmt: skip  # windows of 2 x 2 tokens
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT, **TOKENS)
    return finish(Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl():
    vision = {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 44, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1], **TOWER,
    }  # fmt: skip
    language = {**TEXT, "head_dim": 12, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    config = Qwen3VLConfig(vision_config=vision, text_config=language, **TOKENS)
    return finish(Qwen3VLForConditionalGeneration(config), seed=3)


def pixels(grids: list[list[int]], seed: int) -> torch.Tensor:
    """Return the patches that the processor would cut from images or videos of these grids."""
    return draw(sum(t * h * w for t, h, w in grids), 3 * 2 * 4 * 4, seed=seed)


def batch_of(*texts: list[int], images: list[list[int]], videos: list[list[int]], side: str = "right"):
    """Make a batch without labels; grids are (frames, rows, columns) in patches, four of which are one token."""
    batch = rows(*texts, side=side)
    kinds = (batch["input_ids"] == IMAGE).int() + 2 * (batch["input_ids"] == VIDEO).int()
    batch |= {"mm_token_type_ids": kinds, "pixel_values": pixels(images, 1), "image_grid_thw": torch.tensor(images)}
    if videos:
        batch |= {"pixel_values_videos": pixels(videos, 2), "video_grid_thw": torch.tensor(videos)}
    return batch


def clip(frames: int, size: int, apart: bool) -> list[int]:
    """Write a video's placeholders; `apart` puts a time before every frame (Qwen3-VL)."""
    return [token for n in range(frames) for token in [40 + n] * apart + [VIDEO] * size]


def train_batch(apart: bool):
    """Rows: two images; text alone; an image of ragged windows and a video."""
    return labelled(batch_of(
        text([20, 21], 6, [22, 23, 24], 4, [25, 26, 27, 28]), text([30, 31, 32, 33, 34, 35]),
        text([36], 15, [37], clip(2, 6, apart), [50, 51, 52, 53, 54]),
        images=[[1, 4, 6], [1, 4, 4], [1, 6, 10]], videos=[[2, 6, 4]],
    ))  # fmt: skip


def prompt(apart: bool, word: int):
    """Rows for `generate`; `word` is chosen so that no next token is a near tie, which bf16 may decide either way."""
    return batch_of(
        text([word], 6, [word + 2], 4, [word + 3]), text(clip(2, 4, apart), [word + 10]), text([word + 12, word + 13]),
        images=[[1, 6, 4], [1, 4, 4]], videos=[[2, 4, 4]], side="left",
    )  # fmt: skip


OPS = frozenset({"patch_embed", "rms_norm", "attention", "insert_features", "linear_cross_entropy"})
FAMILIES = [
    Family(
        name="qwen2_vl", build=qwen2_vl, batch=lambda: train_batch(False), prompt=lambda: prompt(False, 37),
        ops=OPS | {"layer_norm", "gelu_mlp"},
    ),
    Family(
        name="qwen2_5_vl", build=qwen2_5_vl,
        batch=lambda: {**train_batch(False), "second_per_grid_ts": torch.tensor([1.0])},
        prompt=lambda: prompt(False, 36), ops=OPS,
    ),
    Family(
        name="qwen3_vl", build=qwen3_vl, batch=lambda: train_batch(True), prompt=lambda: prompt(True, 56),
        ops=OPS | {"layer_norm", "gelu_mlp"},
    ),
]  # fmt: skip
