"""InternVL 2.5 and 3 in transformers' layout (arXiv 2412.05271, 2504.10479): tiles, pixel shuffle, an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmllm.models.families import tied
from fastmllm.models.families.llava import ALIASES, blueprint
from fastmllm.models.families.parts import TilePath, decoder, feature_tower
from fastmllm.models.mllm import Blueprint
from fastmllm.models.weights.connectors import feature_layers, read_projector
from fastmllm.models.weights.values import read_part, read_size


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of an InternVL. Every tile is an image of its own in the text."""
    layer = feature_layers(raw, -1, origin)
    if not isinstance(layer, int):
        raise ValueError(f"fastmllm::MLLM: {origin}: several vision_feature_layer {layer} are not computed here")
    vision = {"model_type": "internvl_vision", **read_part(raw, "vision_config", origin)}
    text = read_part(raw, "text_config", origin)
    tower, _ = feature_tower(raw, vision, origin, -1)
    language = decoder(text, f"{origin} (text_config)", tied=tied(raw, origin), kind="qwen2")
    connector, rules = read_projector(raw, tower.module.config.width, language.config.width, origin)
    path = TilePath(tower.module, connector, language.config.width)
    token = read_size(raw, "image_token_id", 151667, origin, least=0)
    return blueprint(tower, path, language, rules, token=token, aliases=ALIASES[1:])
