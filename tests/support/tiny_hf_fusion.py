"""Tiny models that fuse text and images by Q-Former, resampler, pixel shuffle or gated cross-attention."""

from __future__ import annotations

import torch
from tiny_hf import IDS, IMAGE, LLAMA, PAD, VOCAB, Family, draw, finish, labelled, rows, text
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    OPTConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
         "patch_size": 7}  # fmt: skip
QFORMER = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "cross_attention_frequency": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 64, "encoder_hidden_size": 32,
}  # fmt: skip
OPT = {
    "vocab_size": VOCAB, "hidden_size": 48, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "word_embed_proj_dim": 48, "dropout": 0.0, **IDS,
}  # fmt: skip
QUERIES = 8


def blip2():
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**TOWER), qformer_config=Blip2QFormerConfig(**QFORMER),
        text_config=OPTConfig(**OPT), num_query_tokens=QUERIES, image_token_index=IMAGE, image_text_hidden_size=24,
    )  # fmt: skip
    return finish(Blip2ForConditionalGeneration(config))


def blip2_batch():
    batch = rows(text([20, 21], QUERIES, [22, 23, 24], QUERIES, [25, 26, 27, 28]), text(QUERIES, [30, 31, 32, 33, 34]))
    return labelled({"pixel_values": draw(3, 3, 28, 28), **batch})


def blip2_prompt():
    texts = rows(text([20], QUERIES, [22]), text(QUERIES, [30, 31, 32]), side="left")
    return {"pixel_values": draw(2, 3, 28, 28), **texts}


def instructblip():
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**TOWER), qformer_config=InstructBlipQFormerConfig(**QFORMER),
        text_config=OPTConfig(**OPT), num_query_tokens=QUERIES, image_token_index=IMAGE,
    )  # fmt: skip
    return finish(InstructBlipForConditionalGeneration(config))


def _instructions(*texts):
    """Return the Q-Former's text of each image, padded."""
    return {f"qformer_{name}": t for name, t in rows(*texts).items()}


def instructblip_batch():
    return {**blip2_batch(), **_instructions([40, 41, 42, 43], [44], [45, 46])}


def instructblip_prompt():
    return {**blip2_prompt(), **_instructions([40, 41, 42], [44])}


def _pictures():
    """Return pixels of rows with two, one and no images; the second image is padded to the right and below."""
    pixels, seen = draw(3, 2, 3, 28, 28), torch.ones(3, 2, 28, 28, dtype=torch.bool)
    seen[0, 1, 20:], seen[0, 1, :, 24:] = False, False
    seen[1, 1], seen[2] = False, False
    return {"pixel_values": pixels * seen[:, :, None], "pixel_attention_mask": seen}


def pictures_batch():
    pairs = rows(text([20, 21], 4, [22, 23, 24], 4, [25, 26, 27, 28]), text(4, [30, 31, 32, 33, 34]), text([40] * 6))
    return labelled({**_pictures(), **pairs})


def pictures_prompt():
    texts = rows(text([55], 4, [45], 4), text(4, [56, 47, 32]), text([58, 49, 42]), side="left")
    return {**_pictures(), **texts}


def idefics2():
    config = Idefics2Config(
        vision_config=TOWER, text_config={"model_type": "mistral", **LLAMA}, image_token_id=IMAGE,
        perceiver_config={
            "hidden_size": 48, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4,
            "num_key_value_heads": 2, "resampler_head_dim": 12,
        },
    )  # fmt: skip
    return finish(Idefics2ForConditionalGeneration(config))


def idefics3():
    config = Idefics3Config(
        vision_config=TOWER, text_config={"model_type": "llama", **LLAMA}, scale_factor=2, image_token_id=IMAGE,
        pad_token_id=PAD,
    )  # fmt: skip
    return finish(Idefics3ForConditionalGeneration(config))


def smolvlm():
    config = SmolVLMConfig(
        vision_config=TOWER, text_config={"model_type": "llama", **LLAMA}, scale_factor=2, image_token_id=IMAGE,
        pad_token_id=PAD,
    )  # fmt: skip
    return finish(SmolVLMForConditionalGeneration(config))


def idefics(**more):
    config = IdeficsConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, cross_layer_interval=1, freeze_text_layers=False, freeze_vision_layers=False,
        max_position_embeddings=256, alpha_initializer="ones", **IDS,
        vision_config={
            "embed_dim": 32, "image_size": 28, "patch_size": 7, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "hidden_act": "gelu",
        },
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4,
            "resampler_head_dim": 8, "qk_layer_norms_perceiver": True,
        },
        **{
            "additional_vocab_size": 0, "use_resampler": True, "qk_layer_norms": True, "alpha_type": "vector", **more,
        },
    )  # fmt: skip
    return finish(IdeficsForVisionText2Text(config))


def idefics_batch():
    """Rows that see two images in turn, one, and none; the first words of all see none."""
    batch = rows([1, *range(20, 31)], [1, 40, 41, 42, 43, 44, 45], [1, 50, 51, 52, 53])
    seen = torch.zeros(3, 12, 2, dtype=torch.long)
    seen[0, 2:, 0], seen[0, 6:, 1], seen[1, 1:, 1] = 1, 1, 1
    return labelled({"pixel_values": draw(3, 2, 3, 28, 28), "image_attention_mask": seen, **batch})


def idefics_prompt():
    texts = rows([1, 85, 86, 87, 88], [1, 33, 89], [1, 90], side="left")
    seen = torch.zeros(3, 5, 2, dtype=torch.long)
    seen[0, 1:, 0], seen[0, 3:, 1], seen[1, 3:, 1] = 1, 1, 1
    return {"pixel_values": draw(3, 2, 3, 28, 28), "image_attention_mask": seen, **texts}


def mllama(**more):
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
            "intermediate_size": 64, "vision_output_dim": 32 * 2, "image_size": 28, "patch_size": 7,
            "max_num_tiles": 4, "intermediate_layers_indices": [1],
        },
        text_config={
            "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 2],
            "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, **IDS,
        },
        image_token_index=IMAGE, **more,
    )  # fmt: skip
    return finish(MllamaForConditionalGeneration(config))


def _tiles(length):
    """Return pixels of two rows: images of two tiles and one, and one of three; words see what stood before them."""
    tiles = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [1, 0, 0, 0]]])
    seen = torch.zeros(2, length, 2, 4, dtype=torch.long)
    seen[0, 2:, 0, :2], seen[0, 4:, 1, :1], seen[1, 1:, 0, :3] = 1, 1, 1
    return {
        "pixel_values": draw(2, 2, 4, 3, 28, 28) * tiles[..., None, None, None], "aspect_ratio_mask": tiles,
        "aspect_ratio_ids": torch.tensor([[2, 1], [3, 0]]), "cross_attention_mask": seen,
    }  # fmt: skip


def mllama_batch():
    texts = rows(text([20], 1, [22], 1, [25, 26, 27, 28]), text(1, [30, 31, 32, 33]))
    return labelled({**_tiles(9), **texts})


def mllama_prompt():
    return {**_tiles(6), **rows(text([10], 1, [12], 1, [13]), text(1, [14, 77, 15, 16]))}


MERGED = frozenset({"patch_embed", "layer_norm", "gelu_mlp", "insert_features", "linear_cross_entropy"})
BLIP = MERGED | {"attention"}
FAMILIES = [
    Family(name="blip_2", build=blip2, batch=blip2_batch, prompt=blip2_prompt, ops=BLIP),
    Family(name="instructblip", build=instructblip, batch=instructblip_batch, prompt=instructblip_prompt, ops=BLIP),
    Family(
        name="idefics", build=idefics, batch=idefics_batch, prompt=idefics_prompt,
        ops=frozenset(
            {"patch_embed", "layer_norm", "rms_norm", "gelu_mlp", "gated_residual", "image_kv_cache", "attention"}
        ),
    ),
    Family(
        name="idefics2", build=idefics2, batch=pictures_batch, prompt=pictures_prompt,
        ops=MERGED | {"rms_norm", "cross_attention"},
    ),
    Family(
        name="idefics3", build=idefics3, batch=pictures_batch, prompt=pictures_prompt,
        ops=MERGED | {"rms_norm", "pixel_shuffle"},
    ),
    Family(
        name="mllama", build=mllama, batch=mllama_batch, prompt=mllama_prompt,
        ops=frozenset(
            {"patch_embed", "layer_norm", "rms_norm", "gelu_mlp", "gated_residual", "linear_cross_entropy"}
            | {"cross_attention"}
        ),
    ),
    Family(
        name="smolvlm", build=smolvlm, batch=pictures_batch, prompt=pictures_prompt,
        ops=MERGED | {"rms_norm", "pixel_shuffle"},
    ),
]  # fmt: skip
