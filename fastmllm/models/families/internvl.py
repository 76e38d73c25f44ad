"""InternVL 2.5 and 3 in transformers' layout (arXiv 2412.05271, 2504.10479): tiles, pixel shuffle, an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmllm.models.families import tied
from fastmllm.models.families.llava import ALIASES, blueprint
from fastmllm.models.families.parts import TilePath, decoder, feature_tower
from fastmllm.models.mllm import Blueprint
from fastmllm.models.weights.connectors import read_projector


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of an InternVL. Every tile is an image of its own in the text."""
    layer = raw.get("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise ValueError(f"fastmllm::MLLM: {origin}: several vision_feature_layer {layer} are not computed here")
    vision = {"model_type": "internvl_vision", **raw["vision_config"]}
    tower, _ = feature_tower(raw, vision, origin, -1)
    language = decoder(raw["text_config"], origin, tied=tied(raw), kind="qwen2")
    connector, rules = read_projector(raw, tower.module.config.width, language.config.width)
    path = TilePath(tower.module, connector, language.config.width)
    placeholder = raw.get("image_token_id", 151667)
    return blueprint(tower, path, language, rules, placeholder=placeholder, aliases=ALIASES[1:])
