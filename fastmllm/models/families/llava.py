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
    feature_tower,
    placeholder,
)
from fastmllm.models.language import LanguageModel
from fastmllm.models.mllm import Blueprint
from fastmllm.models.weights.connectors import read_projector
from fastmllm.models.weights.mapping import Rule, prefixed
from fastmllm.models.weights.values import read_part

ALIASES = (
    ("vision_tower.vision_model.", "vision_tower."),  # transformers 4
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of a LLaVA."""
    vision, text = read_part(raw, "vision_config", origin), read_part(raw, "text_config", origin)
    tower, skip = feature_tower(raw, vision, origin, -2, in_a_grid=False)
    language = decoder(text, f"{origin} (text_config)", tied=tied(raw, origin))
    connector, rules = read_projector(raw, tower.module.config.width, language.config.width, origin)
    path = TilePath(tower.module, connector, language.config.width, skip)
    return blueprint(tower, path, language, rules, token=placeholder(raw, 32000, origin))


def blueprint(
    tower: Tower, path: TilePath, language: LanguageModel, connector: Sequence[Rule], *, token: int,
    more: Sequence[Rule] = (), aliases: Sequence[tuple[str, str]] = ALIASES,
) -> Blueprint:  # fmt: skip
    """Lay out what LLaVA and its relatives share: encoder, projector and decoder, each under its own prefix.

    Args:
        tower, path, language: the parts.
        connector: table of the projector.
        token: what visual tokens replace.
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
            unused=tower.unused | decoder_unused("language_model.model."),
            whole=tower.whole,
            tied=language.config.tie_embeddings,
        ),
        placeholders=(token,),
    )
