"""Compositions that are no family of transformers: config.json holds the MLLMConfig, tensors have our own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmllm.models.compose import blueprint
from fastmllm.models.composition import from_json
from fastmllm.models.mllm import Blueprint
from fastmllm.models.weights.values import MOST_LAYERS, read_size

ABOUT = ("model_type", "dtype")  # of config.json, and no parts


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of a composition."""
    parts = {name: value for name, value in raw.items() if name not in ABOUT}
    _check_depths(parts, origin)
    return blueprint(from_json(parts, origin))


def _check_depths(parts: Mapping[str, Any], origin: str) -> None:
    """Refuse numbers of layers that no model has, before they are built."""
    for name, value in parts.items():
        if isinstance(value, Mapping):
            _check_depths(value, f"{origin}: {name}")
        elif name in ("depth", "global_depth"):
            read_size(parts, name, None, origin, most=MOST_LAYERS)
