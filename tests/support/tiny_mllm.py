"""Tiny random models of transformers, one a family, with a batch each: oracles on a CPU, in seconds, offline.

Every parameter is drawn anew: a gate, bias or position that stays 0 would let a wrong layer pass.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as tf
from torch import Tensor

VOCAB, IMAGE, VIDEO, BOS, VSTART, VEND = 128, 5, 6, 1, 7, 8
IDS = {"bos_token_id": BOS, "eos_token_id": 2, "pad_token_id": 0}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 7, "hidden_act": "quick_gelu", "projection_dim": 32}  # fmt: skip
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 7, "hidden_act": "gelu_pytorch_tanh"}  # fmt: skip
TEXT = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, **IDS}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VSTART,
            "vision_end_token_id": VEND}  # fmt: skip
PINPOINTS = [[28, 56], [56, 28], [56, 56]]

Batch = dict[str, Any]


def redraw(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every parameter, norms around 1, and return the model in evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=g)
            if p.dim() <= 1 and "norm" in name.lower() and name.endswith("weight"):
                p.copy_(1 + 0.1 * x)
            elif p.dim() <= 1 or "gate" in name.rsplit(".", 2)[-1] or "alpha" in name:
                p.copy_(0.3 * x)
            else:
                p.copy_(0.5 * x / max(1, p.shape[-1]) ** 0.5)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval().requires_grad_(True)


def pixels(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(*rows: tuple[int, int, int], token: int = IMAGE) -> Batch:
    """Make rows of (tokens before, image tokens, tokens behind), padded on the right."""
    made = []
    for k, (before, image, behind) in enumerate(rows):
        words = [20 + (7 * k + 3 * j) % 90 for j in range(before + behind)]
        made.append([BOS, *words[:before], *[token] * image, *words[before:]])
    length = max(map(len, made))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in made])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in made])
    return {"input_ids": ids, "attention_mask": mask}


def llava() -> tuple[Any, Batch]:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**CLIP), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config), {
        "pixel_values": pixels(2, 3, 28, 28),
        **texts((3, 16, 6), (1, 16, 3)),
    }


def llava_next() -> tuple[Any, Batch]:
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**CLIP), text_config=tf.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE, image_grid_pinpoints=PINPOINTS, vision_feature_layer=-2,
    )  # fmt: skip
    # 56 x 56: an overview and 2 x 2 tiles; 20 high, 50 wide: an overview and 1 x 2 tiles, of which rows are padding
    return tf.LlavaNextForConditionalGeneration(config), {
        "pixel_values": pixels(2, 5, 3, 28, 28), "image_sizes": torch.tensor([[56, 56], [20, 50]]),
        **texts((3, 16 + 8 * 9, 6), (2, 16 + 4 * 9, 2)),
    }  # fmt: skip


def llava_onevision() -> tuple[Any, Batch]:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**SIGLIP), text_config=tf.Qwen2Config(**TEXT), image_token_id=IMAGE,
        video_token_id=VIDEO, image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    return tf.LlavaOnevisionForConditionalGeneration(config), {
        "pixel_values": pixels(2, 5, 3, 28, 28), "image_sizes": torch.tensor([[56, 56], [28, 50]]),
        **texts((3, 16 + 5 * 6, 6), (2, 16 + 4 * 9, 2)),
    }  # fmt: skip


def internvl() -> tuple[Any, Batch]:
    config = tf.InternVLConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": [28, 28], "patch_size": [7, 7], "use_qk_norm": True, "attention_bias": True},
        text_config={"model_type": "qwen2", **TEXT}, image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip
    return tf.InternVLForConditionalGeneration(config), {
        "pixel_values": pixels(3, 3, 28, 28),
        **texts((3, 8, 6), (1, 4, 3)),
    }


BLIP_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "image_size": 28, "patch_size": 7}  # fmt: skip
QFORMER = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
           "intermediate_size": 48, "cross_attention_frequency": 2, "hidden_dropout_prob": 0.0,
           "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64, "encoder_hidden_size": 32}  # fmt: skip
OPT = {"vocab_size": VOCAB, "hidden_size": 48, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "max_position_embeddings": 128, "word_embed_proj_dim": 48, "dropout": 0.0, **IDS}  # fmt: skip


def blip2() -> tuple[Any, Batch]:
    config = tf.Blip2Config(
        vision_config=tf.Blip2VisionConfig(**BLIP_VISION), qformer_config=tf.Blip2QFormerConfig(**QFORMER),
        text_config=tf.OPTConfig(**OPT), num_query_tokens=8, image_token_index=IMAGE, image_text_hidden_size=24,
    )  # fmt: skip
    return tf.Blip2ForConditionalGeneration(config), {
        "pixel_values": pixels(2, 3, 28, 28),
        **texts((3, 8, 6), (1, 8, 3)),
    }


def instructblip() -> tuple[Any, Batch]:
    config = tf.InstructBlipConfig(
        vision_config=tf.InstructBlipVisionConfig(**BLIP_VISION),
        qformer_config=tf.InstructBlipQFormerConfig(**QFORMER), text_config=tf.LlamaConfig(**TEXT),
        num_query_tokens=8, image_token_index=IMAGE,
    )  # fmt: skip
    question = texts((2, 0, 3), (4, 0, 4))
    return tf.InstructBlipForConditionalGeneration(config), {
        "pixel_values": pixels(2, 3, 28, 28), "qformer_input_ids": question["input_ids"],
        "qformer_attention_mask": question["attention_mask"], **texts((3, 8, 6), (1, 8, 3)),
    }  # fmt: skip


def idefics() -> tuple[Any, Batch]:
    config = tf.IdeficsConfig(
        vocab_size=VOCAB, additional_vocab_size=0, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, cross_layer_interval=2, qk_layer_norms=True, use_resampler=True,
        freeze_text_layers=False, freeze_vision_layers=False, max_position_embeddings=256, alpha_type="vector",
        vision_config={"embed_dim": 32, "image_size": 28, "patch_size": 7, "intermediate_size": 64,
                       "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "gelu"},
        perceiver_config={"use_resampler": True, "resampler_n_latents": 4, "resampler_depth": 2,
                          "resampler_n_heads": 4, "resampler_head_dim": 8, "qk_layer_norms_perceiver": True},
        **IDS,
    )  # fmt: skip
    batch = texts((9, 0, 0), (5, 0, 0))
    seen = torch.zeros(*batch["input_ids"].shape, 2, dtype=torch.long)
    seen[0, 2:5, 0] = seen[0, 5:, 1] = seen[1, 3:, 0] = 1  # the first rows see nothing; the second sample has one image
    return tf.IdeficsForVisionText2Text(config), {
        "pixel_values": pixels(2, 2, 3, 28, 28),
        "image_attention_mask": seen,
        **batch,
    }


def mllama() -> tuple[Any, Batch]:
    config = tf.MllamaConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 3, "num_global_layers": 2, "attention_heads": 4,
                       "intermediate_size": 64, "vision_output_dim": 96, "image_size": 28, "patch_size": 7,
                       "max_num_tiles": 4, "intermediate_layers_indices": [0, 2]},
        text_config={**{k: v for k, v in TEXT.items() if k != "num_hidden_layers"}, "num_hidden_layers": 4,
                     "cross_attention_layers": [1, 3],
                     "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        image_token_index=IMAGE,
    )  # fmt: skip
    batch = texts((0, 1, 8), (0, 1, 5))
    seen = torch.zeros(*batch["input_ids"].shape, 1, 4, dtype=torch.long)
    # every row sees an image: transformers' rows without one see all of it, and pass that on to the rows behind
    seen[0, :, :, :2] = seen[1, :7, :, :1] = 1  # two tiles, and one
    used = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]]])
    values = pixels(2, 1, 4, 3, 28, 28) * used[..., None, None, None]  # its processor pads with zeros
    return tf.MllamaForConditionalGeneration(config), {
        "pixel_values": values, "aspect_ratio_ids": torch.tensor([[2], [1]]), "aspect_ratio_mask": used,
        "cross_attention_mask": seen, **batch,
    }  # fmt: skip


def _qwen(patch: int, grids: list[list[int]], rows: tuple[tuple[int, int, int], ...]) -> Batch:
    thw = torch.tensor(grids)
    batch = texts(*rows)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return {"pixel_values": pixels(int(thw.prod(-1).sum()), 3 * 2 * patch * patch), "image_grid_thw": thw, **batch}


def qwen2_vl() -> tuple[Any, Batch]:
    config = tf.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
                       "spatial_merge_size": 2, "temporal_patch_size": 2},
        text_config={**TEXT, "rope_parameters": MROPE}, **QWEN_IDS,
    )  # fmt: skip
    return tf.Qwen2VLForConditionalGeneration(config), _qwen(4, [[1, 4, 6], [1, 2, 4]], ((3, 6, 6), (1, 2, 3)))


def qwen2_5_vl() -> tuple[Any, Batch]:
    config = tf.Qwen2_5_VLConfig(
        vision_config={"depth": 3, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 44, "num_heads": 4,
                       "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
                       "fullatt_block_indexes": [1]},
        text_config={**TEXT, "rope_parameters": MROPE}, **QWEN_IDS,
    )  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(config), _qwen(4, [[1, 6, 10], [1, 4, 4]], ((3, 15, 6), (1, 4, 3)))


def qwen3_vl() -> tuple[Any, Batch]:
    config = tf.Qwen3VLConfig(
        vision_config={"depth": 3, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 44, "num_heads": 4,
                       "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
                       "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        text_config={**TEXT, "head_dim": 12, "rope_parameters": {**MROPE, "mrope_interleaved": True}}, **QWEN_IDS,
    )  # fmt: skip
    return tf.Qwen3VLForConditionalGeneration(config), _qwen(4, [[1, 4, 6], [1, 2, 4]], ((3, 6, 6), (1, 2, 3)))


MODELS: dict[str, Callable[[], tuple[Any, Batch]]] = {
    f.__name__: f
    for f in (
        llava, llava_next, llava_onevision, internvl, blip2, instructblip, idefics, mllama,
        qwen2_vl, qwen2_5_vl, qwen3_vl,
    )
}  # fmt: skip
ACROSS = ("idefics", "mllama")  # their layers look at images beside the text


@functools.cache
def oracle(name: str) -> tuple[Any, Batch]:
    """Return a tiny model of transformers with eager attention, redrawn, and a batch of two samples."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    model.set_attn_implementation("eager")
    return redraw(model), batch


def alone(name: str, row: int) -> Batch:
    """Return one sample of a family's batch, without padding."""
    _, batch = oracle(name)
    length = int(batch["attention_mask"][row].sum())
    patches = [0, *batch["image_grid_thw"].prod(-1).cumsum(0).tolist()] if "image_grid_thw" in batch else []
    one: Batch = {}
    for key, value in batch.items():
        if key == "pixel_values" and patches:
            one[key] = value[patches[row] : patches[row + 1]]
        elif key == "pixel_values" and name == "internvl":
            one[key] = value[:2] if row == 0 else value[2:]
        else:
            one[key] = value[row : row + 1]
        if value.shape[:2] == batch["input_ids"].shape and not key.startswith("qformer"):
            one[key] = one[key][:, :length]
    return one


def joined(name: str) -> Batch:
    """Return both samples as one, with an image in each half."""
    _, batch = oracle(name)
    first, second = alone(name, 0), alone(name, 1)
    one = {key: torch.cat([first[key], second[key]], 1) for key in ("input_ids", "attention_mask")}
    for key, value in batch.items():
        if key in one or key == "mm_token_type_ids":
            continue
        if name not in ACROSS:
            one[key] = value  # images stand one after the other whoever owns them
        elif key.endswith("attention_mask") or key == "cross_attention_mask":
            parts = [first[key][:, :, :1], second[key][:, :, :1]]  # each half sees the first image of its sample
            seen = [
                torch.cat([p, torch.zeros_like(p)] if k == 0 else [torch.zeros_like(p), p], 2)
                for k, p in enumerate(parts)
            ]
            one[key] = torch.cat(seen, 1)
        else:
            one[key] = torch.cat([first[key][:, :1], second[key][:, :1]], 1)
    if name == "mllama":
        one["aspect_ratio_mask"] = torch.cat([first["aspect_ratio_mask"], second["aspect_ratio_mask"]], 1)
    return one
