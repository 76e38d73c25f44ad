"""Compositions that are no family of transformers: config.json holds the MLLMConfig, tensors have our own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmllm.models.compose import blueprint
from fastmllm.models.composition import from_json
from fastmllm.models.mllm import Blueprint

ABOUT = ("model_type", "dtype")  # of config.json, and no parts


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of a composition."""
    return blueprint(from_json({name: value for name, value in raw.items() if name not in ABOUT}, origin))
