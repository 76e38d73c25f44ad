"""The cases of dropin.py: models of transformers at published widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    IdeficsConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

Given = dict[str, Any]
BOTH = (torch.float32, torch.bfloat16)
IMAGE = 151646  # a token of Qwen2's vocabulary
SIDE, VISUAL = 112, 64  # pixels and tokens of an image
TILE = 401  # tokens of a tile of 280 px


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, what is called, and what the patch is meant to give.

    Args:
        name: of the row.
        what: shapes, in words.
        build: makes the model.
        inputs: makes what it is called with, for a device and dtype.
        call: one forward; of a step it returns the loss.
        step: forward and backward in training mode.
        freeze: what of a step's model does not learn.
        goal: ratio that is wanted.
        dtypes: to measure in.
        rounds: at most.
    """

    name: str
    what: str
    build: Callable[[], nn.Module]
    inputs: Callable[[str, torch.dtype], Given]
    call: Callable[[nn.Module, Given], Any] = lambda model, given: model(**given)[0]
    step: bool = False
    freeze: Callable[[nn.Module], Any] = lambda model: None
    goal: float | None = None
    dtypes: tuple[torch.dtype, ...] = BOTH
    rounds: int = 7


def clip() -> nn.Module:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16, image_size=336,
            patch_size=14,
        )
    )  # fmt: skip


def pictures(count: int, side: int) -> Callable[[str, torch.dtype], Given]:
    return lambda device, dtype: {"pixel_values": torch.randn(count, 3, side, side).to(device, dtype)}


def qwen(depth: int = 2) -> nn.Module:
    config = Qwen2_5_VLConfig(
        vision_config={"depth": depth, "hidden_size": 1280, "fullatt_block_indexes": [depth - 1]}
    ).vision_config
    return Qwen2_5_VisionTransformerPretrainedModel(config)


def patches(*grids: tuple[int, int, int]) -> Callable[[str, torch.dtype], Given]:
    def make(device: str, dtype: torch.dtype) -> Given:
        grid = torch.tensor(grids)
        return {
            "hidden_states": torch.randn(int(grid.prod(-1).sum()), 1176).to(device, dtype), "grid_thw": grid.to(device)
        }  # fmt: skip

    return make


def qformer() -> nn.Module:
    return Blip2QFormerModel(
        Blip2QFormerConfig(num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def queries(device: str, dtype: torch.dtype) -> Given:
    states = torch.randn(4, 257, 1408).to(device, dtype)
    return {"query_embeds": torch.randn(4, 32, 768).to(device, dtype), "encoder_hidden_states": states}


def gated_layer() -> nn.Module:
    """One gated cross-attention layer of IDEFICS-9B."""
    config = IdeficsConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, alpha_initializer="ones",
        alpha_type="vector", qk_layer_norms=True, vision_config={"embed_dim": 1280},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return IdeficsGatedCrossAttentionLayer(config, layer_idx=0)


def decoding(device: str, dtype: torch.dtype) -> Given:
    """One token that sees the 64 latents of two images, as at every step of decoding."""
    return {
        "hidden_states": torch.randn(1, 1, 4096).to(device, dtype),
        "image_hidden_states": torch.randn(1, 128, 1280).to(device, dtype),
        "image_attention_mask": torch.zeros(1, 1, 1, 128).to(device, dtype),
        "cross_attention_gate": torch.ones(1, 1).to(device, dtype),
    }


def tile_attention() -> nn.Module:
    """The cross-attention of one layer of Llama-3.2-11B-Vision."""
    widths = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = MllamaConfig(text_config=widths).text_config
    config._attn_implementation = "sdpa"
    return MllamaTextCrossAttention(config, layer_idx=3)


def tiles(device: str, dtype: torch.dtype) -> Given:
    """128 words that see two tiles of four; the first four see no image, for which transformers shows them all."""
    mask = torch.zeros(1, 1, 128, 4 * TILE)
    mask[:, :, 4:, 2 * TILE :] = torch.finfo(dtype).min
    return {
        "hidden_states": torch.randn(1, 128, 4096).to(device, dtype),
        "cross_attention_states": torch.randn(4, TILE, 4096).to(device, dtype),
        "attention_mask": mask.to(device, dtype),
    }


def llava(layers: int, tower: int = 4) -> LlavaForConditionalGeneration:
    """SigLIP-so400m and Qwen2-0.5B, as LLaVA-OneVision-0.5B joins them."""
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=1152, intermediate_size=4304, num_hidden_layers=tower, num_attention_heads=16,
                image_size=SIDE, patch_size=14, vision_use_head=False,
            ),
            text_config=Qwen2Config(
                vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers,
                num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
            ),
            image_token_id=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full",
        )
    )  # fmt: skip


def dialogue(text: int, images: int = 1, scored: float = 0.15) -> Callable[[str, torch.dtype], Given]:
    """A row of an image's tokens and some text, whose last tokens are scored."""

    def make(device: str, dtype: torch.dtype) -> Given:
        ids = torch.cat([torch.full((VISUAL * images,), IMAGE), torch.randint(0, 150000, (text,))])[None]
        labels = ids.clone()
        labels[:, : -round(scored * ids.shape[1])] = -100
        given: Given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if images:
            given["pixel_values"] = torch.randn(images, 3, SIDE, SIDE).to(dtype)
        return {name: t.to(device) for name, t in given.items()}

    return make


def unlabelled(make: Callable[[str, torch.dtype], Given]) -> Callable[[str, torch.dtype], Given]:
    def without(device: str, dtype: torch.dtype) -> Given:
        given = make(device, dtype)
        del given["labels"]
        return given

    return without


def loss(model: nn.Module, given: Given) -> Tensor:
    return model(**given).loss


def summed(model: nn.Module, given: Given) -> Tensor:
    out = model(**given)[0]
    return out.float().square().mean()


def prefill(model: nn.Module, given: Given) -> Tensor:
    return model(**given, use_cache=True, logits_to_keep=1).logits


def freeze_tower(model: Any) -> None:
    model.model.vision_tower.requires_grad_(False)


ALL = (
    Case(name="clip_tower", what="ViT-L/14-336, 2 of 24 layers, one image", build=clip, inputs=pictures(1, 336)),
    Case(name="clip_tower_step", what="the same, forward and backward", build=clip, inputs=pictures(1, 336),
         call=summed, step=True),
    Case(name="qwen2_5_patch_embed", what="Conv3d, 1024 patches", build=lambda: qwen(1).patch_embed, goal=3.0,
         inputs=lambda device, dtype: {"hidden_states": torch.randn(1024, 1176).to(device, dtype)},
         call=lambda model, given: model(**given), rounds=11),
    Case(name="qwen2_5_patch_embed_step", what="the same, forward and backward", build=lambda: qwen(1).patch_embed,
         inputs=lambda device, dtype: {"hidden_states": torch.randn(1024, 1176).to(device, dtype)},
         call=lambda model, given: model(**given).float().square().mean(), step=True, goal=3.0, rounds=11),
    Case(name="qwen2_5_tower_336", what="1 windowed and 1 full of 32 layers, 336 px", build=qwen,
         inputs=patches((1, 24, 24))),
    Case(name="qwen2_5_tower_672", what="the same, 672 px", build=qwen, inputs=patches((1, 48, 48)), rounds=6,
         dtypes=(torch.bfloat16,)),
    Case(name="qwen2_5_tower_step", what="224 px, forward and backward", build=qwen, inputs=patches((1, 16, 16)),
         call=summed, step=True),
    Case(name="qformer", what="2 of 12 layers, 32 queries × 257 tokens, 4 images", build=qformer, inputs=queries,
         rounds=11),
    Case(name="qformer_step", what="the same, forward and backward", build=qformer, inputs=queries, call=summed,
         step=True),
    Case(name="gated_decode", what="IDEFICS-9B gated layer, one token, 128 latents", build=gated_layer, inputs=decoding,
         goal=1.4, rounds=15),
    Case(name="tile_attention", what="Llama-3.2-11B-Vision's cross-attention, 128 words, 2 of 4 tiles of 280 px",
         build=tile_attention, inputs=tiles),
    Case(name="tile_attention_step", what="the same, forward and backward", build=tile_attention, inputs=tiles,
         call=summed, step=True, rounds=6),
    Case(name="head_and_loss", what="896 × 151936, 128 rows, 85 % ignored, forward and backward",
         build=lambda: llava(0, 1), inputs=dialogue(128, images=0), call=loss, step=True, goal=4.0, rounds=6),
    Case(name="head_and_loss_all", what="the same, no row ignored", build=lambda: llava(0, 1),
         inputs=dialogue(128, images=0, scored=1.0), call=loss, step=True, rounds=6, dtypes=(torch.bfloat16,)),
    Case(name="sft_step", what="LLaVA-OneVision-0.5B's widths and 24 layers, frozen tower of 4 of 27 layers, 64 visual "
         "and 64 text tokens, 85 % ignored", build=lambda: llava(24), inputs=dialogue(64), call=loss, step=True,
         freeze=freeze_tower, goal=1.2, rounds=6),
    Case(name="prefill", what="the same model's first token, 6 of 24 layers", build=lambda: llava(6),
         inputs=unlabelled(dialogue(64)), call=prefill, rounds=11),
)  # fmt: skip
CASES = {case.name: case for case in ALL}
