"""Tiny towers as models of their own: CLIP, SigLIP, SigLIP 2, DINOv2."""

from __future__ import annotations

import torch
import transformers as hf
from tiny_hf import CLIP, EOS, IDS, SIGLIP, VOCAB, Family, draw, finish, rows, text

WORDS = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, **IDS,
}  # fmt: skip
DINO = {
    "hidden_size": 32, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7, "layerscale_value": 0.7,
}  # fmt: skip
GRIDS = [[4, 4], [2, 7], [3, 5]]  # patches of each image: rows, columns


def clip():
    config = hf.CLIPConfig(text_config={**WORDS, "projection_dim": 32}, vision_config=CLIP, projection_dim=32)
    return finish(hf.CLIPModel(config))


def siglip():
    config = hf.SiglipConfig(text_config={**WORDS, "projection_size": 32}, vision_config=SIGLIP)
    return finish(hf.SiglipModel(config))


def siglip2():
    vision = {k: v for k, v in SIGLIP.items() if k != "image_size"}
    config = hf.Siglip2Config(text_config={**WORDS, "projection_size": 32}, vision_config={**vision, "num_patches": 16})
    return finish(hf.Siglip2Model(config))


def dinov2():
    return finish(hf.Dinov2Model(hf.Dinov2Config(**DINO)))


def dinov2_with_registers():
    config = hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
    return finish(hf.Dinov2WithRegistersModel(config))


def _texts():
    batch = rows(text([20, 21, 22, EOS]), text([23, EOS]), text([24, 25, 26, 27, 28, EOS]))
    return {**batch, "return_loss": True}


def clip_batch():
    return {"pixel_values": draw(3, 3, 28, 28), **_texts()}


def siglip_batch():  # an image that is no whole number of patches
    return {"pixel_values": draw(3, 3, 30, 33), "interpolate_pos_encoding": True, **_texts()}


def siglip2_batch():
    seen = torch.arange(16) < torch.tensor(GRIDS).prod(1, keepdim=True)
    pixels = {"pixel_values": draw(3, 16, 3 * 7 * 7), "pixel_attention_mask": seen.long()}
    return {**pixels, "spatial_shapes": torch.tensor(GRIDS), **_texts()}


def dinov2_batch():  # positions are interpolated to 5 x 3 patches
    return {"pixel_values": draw(3, 3, 35, 21)}


OPS = frozenset({"layer_norm", "gelu_mlp"})
FAMILIES = [
    Family(name="clip", build=clip, batch=clip_batch, ops=OPS | {"patch_embed"}),
    Family(name="siglip", build=siglip, batch=siglip_batch, ops=OPS | {"patch_embed"}),
    Family(name="siglip2", build=siglip2, batch=siglip2_batch, ops=OPS),  # its patches go through nn.Linear
    Family(name="dinov2", build=dinov2, batch=dinov2_batch, ops=OPS | {"patch_embed"}),
    Family(name="dinov2_with_registers", build=dinov2_with_registers, batch=dinov2_batch, ops=OPS | {"patch_embed"}),
]
