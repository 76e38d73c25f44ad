"""InternVL 2.5 and 3 in transformers' layout (arXiv 2412.05271, 2504.10479): tiles, pixel shuffle, an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmllm.models.families.llava import refuse_class_token
from fastmllm.models.families.parts import (
    TilePath,
    decoder,
    decoder_rules,
    decoder_unused,
    vision_tower,
)
from fastmllm.models.mllm import Blueprint, Layout
from fastmllm.models.weights.connectors import read_projector
from fastmllm.models.weights.mapping import prefixed

ALIASES = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of an InternVL. Every tile is an image of its own in the text."""
    layer = raw.get("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise ValueError(f"fastmllm::MLLM: {origin}: several vision_feature_layer {layer} are not computed here")
    changes = {} if layer == -1 else {"layer": layer, "final_norm": False}
    vision = {"model_type": "internvl_vision", **raw["vision_config"]}
    tower = vision_tower(vision, "vision_tower.", origin, **changes)
    refuse_class_token(raw, tower.module.config.cls_token, origin)
    tied = bool(raw.get("tie_word_embeddings", True))
    language = decoder(raw["text_config"], origin, tied=tied, kind="qwen2")
    connector, rules = read_projector(raw, tower.module.config.width, language.config.width)
    return Blueprint(
        images=TilePath(tower.module, connector, language.config.width),
        language=language,
        layout=Layout(
            rules=[
                *tower.rules,
                *prefixed(rules, "images.connector."),
                *decoder_rules("language_model.model.", "language_model."),
            ],
            aliases=ALIASES,
            unused=[*tower.unused, *decoder_unused("language_model.model.")],
            spare=tower.spare,
            tied=tied,
        ),
        placeholders=(raw.get("image_token_id", 151667),),
    )
