"""Fresh compositions: any encoder, resolution, connector and fusion that go together, in front of any decoder."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fastmllm.data.resolution import AnyRes, CogAgent, Fixed, InternVL, Mllama, Native, Policy
from fastmllm.models.checkpoint import Layout
from fastmllm.models.composed_paths import DualPath, GridPath, make_connector
from fastmllm.models.composition import MLLMConfig, to_json
from fastmllm.models.eva import EvaVisionTransformer
from fastmllm.models.families.any_resolution import AnyResPath
from fastmllm.models.families.idefics import IdeficsPath
from fastmllm.models.families.mllama import MllamaPath
from fastmllm.models.families.parts import TilePath
from fastmllm.models.families.qwen_vl import NativePath
from fastmllm.models.image_path import ImagePath
from fastmllm.models.language import LanguageModel
from fastmllm.models.mllama_vision import MllamaVision, MllamaVisionConfig
from fastmllm.models.mllm import MLLM, Blueprint
from fastmllm.models.packing import Packing
from fastmllm.models.published import as_published
from fastmllm.models.qwen_vision import QwenVision, QwenVisionConfig
from fastmllm.models.vision import VisionTransformer
from fastmllm.models.weights.mapping import Rule
from fastmllm.modules.cross_attention import CrossAttentionConfig, GatedCrossAttention
from fastmllm.modules.high_res import HighResConfig, HighResCrossAttention

CANVASES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # LLaVA-NeXT's, in tiles
DEEPEST = 16  # words of a parameter's name
_BLOCKS = ("pixel_shuffle", "ldp", "token_packer")  # one token a block of patches


def compose(config: MLLMConfig, seed: int = 0) -> MLLM:
    """Make a model with fresh weights.

    Args:
        config: the parts.
        seed: of all weights, whatever the state of torch's generator, which stays as it is. Gates are 0, so that
            flamingo, idefics and mllama start as the language model; linear layers are small normal numbers.

    Returns:
        The model, in training mode, fp32, on the CPU. `save_pretrained` writes the layout of a transformers family
        where the composition is exactly one, and else our own; `MLLM.from_pretrained` reads both.

    Raises:
        ValueError: sizes that do not fit; parts that do not go together are refused by `MLLMConfig`.
    """
    with torch.device("meta"):
        shape = blueprint(config)
        published = as_published(config, shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = blueprint(config)
        for layer in (*made.language.cross_layers.values(), *made.language.inner_layers.values()):
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
    if published is None:
        return MLLM(made, {"model_type": "fastmllm", **to_json(config)})
    assert made.packing is not None
    model = MLLM(replace(made, layout=published.layout), published.raw | {"fastmllm": made.packing.to_json()})
    model.checkpoint.spare = published.spare
    return model


def blueprint(config: MLLMConfig) -> Blueprint:
    """Build the parts; their layout is our own names.

    Raises:
        ValueError: sizes that do not fit.
    """
    policy = make_policy(config)
    images = _images(config, policy)
    language = LanguageModel(config.language)
    slots = language.inner_layers if config.fusion == "cogagent" else language.cross_layers
    for place in config.places:
        slots[str(place)] = _cross_layer(config, images)
    spliced = config.fusion in ("tokens", "deepstack", "cogagent")
    tied = config.language.tie_embeddings
    return Blueprint(
        images=images,
        language=language,
        layout=Layout(rules=[Rule(name, name) for name in _any_names()], tied=tied),
        placeholders=(config.image_token_id,) if spliced else (),
        packing=Packing(policy=policy, image_token=config.image_token_id),
    )


def _any_names() -> list[str]:
    """Return patterns that every name fits."""
    return [".".join(f"{{word{k}}}" for k in range(words)) for words in range(1, DEEPEST + 1)]


def make_policy(config: MLLMConfig) -> Policy:
    """Make the resolution policy of a composition.

    What its plans say of tokens is right where the connector keeps a grid or the resolution is fixed; what stands in a
    batch is counted by the image path.

    Raises:
        ValueError: its sizes do not fit the encoder's or the connector's.
    """
    encoder, sizes = config.encoder, config.resolution_sizes
    patch = encoder.patch_size
    if isinstance(encoder, MllamaVisionConfig):
        return Mllama(image_size=encoder.tile_size, patch_size=patch, max_tiles=encoder.max_tiles)
    block = config.connector_sizes.block if config.connector in _BLOCKS else 1
    if isinstance(encoder, QwenVisionConfig):
        return Native(
            patch_size=patch, merge_size=encoder.merge_size, temporal_patch_size=encoder.temporal_patch_size,
            min_pixels=sizes.min_pixels, max_pixels=sizes.max_pixels,
        )  # fmt: skip
    if config.resolution == "native":
        return Native(
            patch_size=patch, merge_size=block, temporal_patch_size=1, min_pixels=sizes.min_pixels,
            max_pixels=sizes.max_pixels,
        )  # fmt: skip
    size = encoder.image_size
    if config.resolution == "dual":
        assert config.high_res is not None
        return CogAgent(image_size=size, cross_image_size=config.high_res.image_size, patch_size=patch, border_tokens=0)
    queries = {"qformer": config.connector_sizes.tokens, "resampler": config.connector_sizes.tokens,
               "abstractor": config.connector_sizes.side**2}.get(config.connector)  # fmt: skip
    if config.resolution == "fixed":
        return Fixed(
            image_size=size, patch_size=patch, fit=sizes.fit, shuffle=block, queries=queries,
            cross=config.fusion != "tokens",
        )  # fmt: skip
    if config.resolution == "tiles":
        most = 12 if sizes.max_tiles is None else sizes.max_tiles
        return InternVL(
            image_size=size, patch_size=patch, shuffle=block, min_tiles=sizes.min_tiles, max_tiles=most,
            thumbnail=sizes.thumbnail,
        )  # fmt: skip
    canvases = tuple((size * a, size * b) for a, b in CANVASES) if sizes.pinpoints is None else sizes.pinpoints
    # tiles are joined behind the connector: what it makes of a tile is the grid that is joined
    side = config.connector_sizes.side if config.connector == "abstractor" else size // patch // block
    if size % side:
        raise ValueError(f"MLLMConfig: image_size {size} is no multiple of the {side} tokens on a side of a tile")
    return AnyRes(image_size=size, patch_size=size // side, pinpoints=canvases, max_tiles=sizes.max_tiles)


def _images(config: MLLMConfig, policy: Policy) -> ImagePath:
    """Make encoder and connector."""
    encoder, width = config.encoder, config.language.width
    if isinstance(encoder, MllamaVisionConfig):
        return MllamaPath(MllamaVision(encoder), width)
    if isinstance(encoder, QwenVisionConfig):
        return NativePath(QwenVision(encoder), config.image_token_id, -1, None, False)
    vision = VisionTransformer(encoder)
    connector, made = make_connector(config, vision.width)
    if config.fusion == "idefics" and config.resolution == "fixed" and config.connector in ("resampler", "none"):
        resampler = getattr(connector, "resampler", None)
        return IdeficsPath(vision, resampler)  # class tokens are among the keys
    if config.resolution == "native":
        keeps = config.connector not in ("qformer", "resampler", "abstractor")
        block = config.connector_sizes.block if config.connector in _BLOCKS else 1
        return GridPath(vision, connector, made, block if keeps else None)
    if config.resolution == "dual":
        assert config.high_res is not None
        return DualPath(vision, connector, made, EvaVisionTransformer(config.high_res))
    if isinstance(policy, AnyRes):
        return AnyResPath(vision, connector, made, policy)
    return TilePath(vision, connector, made)


def _cross_layer(config: MLLMConfig, images: ImagePath) -> nn.Module:
    """Make one layer that looks at what `images` gives."""
    language, media_width = config.language, images.across_width or images.width
    width, eps = language.width, language.norm_eps
    if config.fusion == "cogagent":
        return HighResCrossAttention(
            HighResConfig(width=width, media_width=media_width, num_heads=language.num_heads, norm_eps=eps)
        )
    if config.fusion == "flamingo":
        return GatedCrossAttention(CrossAttentionConfig.flamingo(width=width, media_width=media_width))
    if config.fusion == "idefics":
        return GatedCrossAttention(
            CrossAttentionConfig.idefics(
                width=width, media_width=media_width, num_heads=language.num_heads, ffn_width=language.mlp_width,
                norm_eps=eps,
            )
        )  # fmt: skip
    llama = CrossAttentionConfig.mllama(
        width=width, num_heads=language.num_heads, num_kv_heads=language.num_kv_heads, ffn_width=language.mlp_width,
        norm_eps=eps,
    )  # fmt: skip
    return GatedCrossAttention(replace(llama, media_width=media_width))
