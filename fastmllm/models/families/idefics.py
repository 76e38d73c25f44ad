"""Idefics (v1), the open Flamingo (arXiv 2306.16527): CLIP, a Perceiver, gated cross-attention before Llama layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmllm.data.resolution.plan import Plan
from fastmllm.models.checkpoint import Layout
from fastmllm.models.families import tied
from fastmllm.models.families.parts import (
    WholePath,
    cut,
    decoder,
    decoder_rules,
    decoder_unused,
    flat,
    vision_tower,
)
from fastmllm.models.image_path import Seen, Visual
from fastmllm.models.mllm import Blueprint
from fastmllm.models.tower import Features
from fastmllm.models.vision import VisionTransformer
from fastmllm.models.weights.fusion import (
    IDEFICS_RESAMPLER,
    idefics_cross_config,
    idefics_cross_rules,
    idefics_resampler_config,
)
from fastmllm.models.weights.mapping import Join, Rule, prefixed
from fastmllm.models.weights.values import read_part, read_size
from fastmllm.modules.cross_attention import GatedCrossAttention
from fastmllm.modules.resampler import PerceiverResampler


class IdeficsPath(WholePath):
    """Encode images of one size, class tokens included, and resample them.

    Args:
        vision: the encoder.
        resampler: the Perceiver, or None: all tokens are media.
    """

    def __init__(self, vision: VisionTransformer, resampler: PerceiverResampler | None) -> None:
        super().__init__()
        self.vision, self.resampler, self.width = vision, resampler, vision.config.width

    def connect(self, features: Features, arguments: Mapping[str, Any]) -> Visual:
        """Resample the images' rows."""
        (tokens,), images, grid = features, arguments["images"], arguments["grid"]
        if self.resampler is None:
            return Visual(tokens=tokens)
        each = grid[0] * grid[1] + 1
        bounds = torch.arange(images + 1, dtype=torch.int32, device=tokens.device) * each
        return Visual(tokens=self.resampler(tokens, bounds, each))

    def read(self, batch: Mapping[str, Any]) -> Seen | None:
        """Take `pixel_values` (B, I, 3, H, W) and `image_attention_mask` (B, L, I) out of a processor's batch."""
        pixels, mask = batch.get("pixel_values"), batch.get("image_attention_mask")
        if pixels is None or not pixels.numel():
            return None
        batch_size, length = batch["input_ids"].shape
        if len(pixels) != batch_size:
            raise ValueError(f"fastmllm::MLLM: pixel_values of {len(pixels)} samples, but input_ids of {batch_size}")
        if mask is None or mask.shape != (batch_size, length, pixels.shape[1]):
            shape = None if mask is None else tuple(mask.shape)
            raise ValueError(f"fastmllm::MLLM: image_attention_mask {shape} must be (B, L, I) with I {pixels.shape[1]}")
        size = self.vision.config.patch_size
        grid = (pixels.shape[-2] // size, pixels.shape[-1] // size)
        each = grid[0] * grid[1] + 1 if self.resampler is None else self.resampler.config.num_latents
        start, stop = runs(mask != 0, "image_attention_mask")
        first = torch.arange(len(pixels))[:, None] * pixels.shape[1]  # images of the samples before
        return Seen(
            arguments={"patches": cut(pixels.flatten(0, 1), size), "images": pixels.shape[0] * pixels.shape[1],
                       "grid": grid},
            media=(((first + start) * each).int(), ((first + stop) * each).int(), pixels.shape[1] * each),
        )  # fmt: skip

    def take(self, tiles: Sequence[tuple[Tensor, ...]], plans: Sequence[Plan]) -> Seen:
        """Take images of one size."""
        patches, grid = flat(tiles, self.vision.config.patch_size)
        each = grid[0] * grid[1] + 1 if self.resampler is None else self.resampler.config.num_latents
        return Seen(arguments={"patches": patches, "images": len(tiles), "grid": grid}, counts=[each] * len(tiles))


def runs(seen: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the first and the end of the one run of true entries in each row of (..., I); (0, 0) where there is none.

    Raises:
        ValueError: the true entries of a row are not neighbours.
    """
    place = torch.arange(seen.shape[-1])
    start = torch.where(seen, place, seen.shape[-1]).amin(-1)
    stop = torch.where(seen, place + 1, 0).amax(-1)
    none = stop == 0
    if bool(((stop - start != seen.sum(-1)) & ~none).any()):
        raise ValueError(f"fastmllm::MLLM: a row of {name} sees images that are not neighbours: not computed here")
    return torch.where(none, 0, start), stop


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of an Idefics."""
    vision = {"model_type": "idefics_vision", **read_part(raw, "vision_config", origin, {})}
    if vision["model_type"] not in ("idefics_vision", "idefics"):
        raise ValueError(f"fastmllm::MLLM: {origin}: vision_config is of model_type {vision['model_type']!r}")
    tower = vision_tower({**vision, "model_type": "idefics_vision"}, "model.vision_model.", origin)
    language = decoder(raw, origin, tied=tied(raw, origin), kind="idefics")
    config, every = idefics_cross_config(raw, origin), read_size(raw, "cross_layer_interval", 1, origin)
    rules: list[Rule] = []
    for k in range(language.config.depth // every):
        language.cross_layers[str(k * every)] = GatedCrossAttention(config)
        rules += prefixed(
            idefics_cross_rules(config), f"language.cross_layers.{k * every}.", f"model.gated_cross_attn_layers.{k}."
        )
    resampler = idefics_resampler_config(raw, origin)
    path = IdeficsPath(tower.module, None if resampler is None else PerceiverResampler(resampler))
    extra = raw.get("additional_vocab_size", 0)
    return Blueprint(
        images=path,
        language=language,
        layout=Layout(
            rules=[
                *tower.rules,
                *prefixed(IDEFICS_RESAMPLER, "images.resampler.", "model.perceiver_resampler."),
                *rules,
                *(_with_extra(raw.get("vocab_size", 32000), extra) if extra else []),
                *decoder_rules("model.", ""),
            ],
            unused=tower.unused | decoder_unused("model.") | {
                "model.gated_cross_attn_layers.{i}.cross_attn.rotary_emb.inv_freq": (-1,),
            },
            whole=tower.whole,
            tied=language.config.tie_embeddings,
        ),
    )  # fmt: skip


def _with_extra(vocab: int, extra: int) -> list[Rule]:
    """Name the embeddings and head of the tokens that Idefics adds, which a checkpoint keeps apart."""
    rows = Join(sizes=(vocab, extra))
    embeddings = ("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight")
    return [
        Rule("language.model.embed_tokens.weight", embeddings, rows),
        Rule("language.lm_head.weight", ("lm_head.weight", "lm_head.additional_fc.weight"), rows),
    ]
