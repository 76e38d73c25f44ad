"""LLaVA-1.5 (arXiv 2310.03744): CLIP, an MLP, tokens in the text; transformers' LlavaForConditionalGeneration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastmllm.models.checkpoint import Layout
from fastmllm.models.families import tied
from fastmllm.models.families.parts import (
    TilePath,
    Tower,
    decoder,
    decoder_rules,
    decoder_unused,
    feature_layer,
    vision_tower,
)
from fastmllm.models.language import LanguageModel
from fastmllm.models.mllm import Blueprint
from fastmllm.models.weights.connectors import read_projector
from fastmllm.models.weights.mapping import Rule, prefixed

ALIASES = (
    ("vision_tower.vision_model.", "vision_tower."),  # transformers 4
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of a LLaVA."""
    tower = vision_tower(raw["vision_config"], "vision_tower.", origin, **feature_layer(raw, origin, -2))
    refuse_class_token(raw, tower.module.config.cls_token, origin)
    language = decoder(raw["text_config"], origin, tied=tied(raw))
    connector, rules = read_projector(raw, tower.module.config.width, language.config.width)
    path = TilePath(tower.module, connector, language.config.width)
    placeholder = raw.get("image_token_id", raw.get("image_token_index", 32000))
    return blueprint(tower, path, language, rules, placeholder=placeholder)


def blueprint(
    tower: Tower, path: TilePath, language: LanguageModel, connector: Sequence[Rule], *, placeholder: int,
    more: Sequence[Rule] = (), aliases: Sequence[tuple[str, str]] = ALIASES,
) -> Blueprint:  # fmt: skip
    """Lay out what LLaVA and its relatives share: encoder, projector and decoder, each under its own prefix.

    Args:
        tower, path, language: the parts.
        connector: table of the projector.
        placeholder: token that visual tokens replace.
        more: further rules.
        aliases: as in `Layout`.
    """
    return Blueprint(
        images=path,
        language=language,
        layout=Layout(
            rules=[
                *tower.rules,
                *prefixed(connector, "images.connector."),
                *more,
                *decoder_rules("language_model.model.", "language_model."),
            ],
            aliases=aliases,
            unused=[*tower.unused, *decoder_unused("language_model.model.")],
            whole=tower.whole,
            tied=language.config.tie_embeddings,
        ),
        placeholders=(placeholder,),
    )


def refuse_class_token(raw: Mapping[str, Any], has_one: bool, origin: str) -> None:
    """Refuse features with a class token among them.

    Raises:
        ValueError: the checkpoint wants them.
    """
    if has_one and raw.get("vision_feature_select_strategy", "default") == "full":
        raise ValueError(
            f"fastmllm::MLLM: {origin}: vision_feature_select_strategy 'full' keeps the class token; only the patches "
            "('default') are computed here"
        )
