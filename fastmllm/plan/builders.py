"""From a text_config to the parts of a stack: a family of transformers, or a composition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastmllm.models.compose import blueprint
from fastmllm.models.composition import ConnectorSizes, MLLMConfig
from fastmllm.models.families import build
from fastmllm.models.mllm import Blueprint
from fastmllm.models.sizes import Raw
from fastmllm.models.vision import VisionConfig
from fastmllm.models.weights.language import language_config
from fastmllm.modules.projector import ShuffleProjector

IMAGE_TOKEN = 1  # of fresh compositions: any row of the table


def family(raw: Callable[[Raw], Raw]) -> Callable[[Raw], Blueprint]:
    """Return what builds the parts of a family, of a function of `fastmllm.models.sizes`."""
    return lambda inside: build(raw(inside), "plan")


def composed(encoder: VisionConfig, inside: Raw, **parts: Any) -> Blueprint:
    """Build a composition around a ViT; `parts` are fields of `MLLMConfig`."""
    return blueprint(
        MLLMConfig(encoder=encoder, language=language_config(inside, "plan"), image_token_id=IMAGE_TOKEN, **parts)
    )


def shuffled(encoder: VisionConfig, block: int, inside: Raw) -> Blueprint:
    """Tiles through a pixel shuffle and one linear layer: Idefics3, SmolVLM, nanoVLM."""
    made = composed(
        encoder, inside, resolution="tiles", connector="pixel_shuffle", connector_sizes=ConnectorSizes(block=block)
    )
    width: int = made.images.width
    made.images.connector = ShuffleProjector(encoder.width, width, shuffle=block)
    return made


def vit(width: int, depth: int, heads: int, mlp: int, patch: int, image: int, **more: Any) -> VisionConfig:
    """Say the shape of a ViT without LayerScale: width, blocks, heads, width of the MLP, patch and image in pixels."""
    return VisionConfig(
        width=width, depth=depth, num_heads=heads, mlp_ratio=mlp / width, patch_size=patch, image_size=image,
        layer_scale=None, **more,
    )  # fmt: skip
