"""One file a family of checkpoints: from its config.json to a model and the table of its names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastmllm.models.packing import Packing

if TYPE_CHECKING:
    from fastmllm.models.mllm import Blueprint

FAMILIES = {  # model_type of config.json -> file
    "llava": "llava",
    "llava_next": "any_resolution",
    "llava_onevision": "any_resolution",
    "internvl": "internvl",
    "blip-2": "blip2",
    "instructblip": "blip2",
    "idefics": "idefics",
    "mllama": "mllama",
    "qwen2_vl": "qwen_vl",
    "qwen2_5_vl": "qwen_vl",
    "qwen3_vl": "qwen_vl",
    "fastmllm": "composed",
}


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of a model from a config.json.

    Args:
        raw: the configuration.
        origin: what the messages call it.

    Raises:
        ValueError: an unknown architecture, or a variant that is not computed here.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"fastmllm::MLLM: {origin} has model_type {kind!r}; known: {', '.join(FAMILIES)}")
    try:
        blueprint: Blueprint = import_module(f"{__name__}.{FAMILIES[kind]}").build(raw, origin)
    except KeyError as error:
        raise ValueError(f"fastmllm::MLLM: the config.json of {origin} lacks {error.args[0]!r}") from error
    if "fastmllm" in raw:  # a fresh composition, written as one of the families
        blueprint = replace(blueprint, packing=Packing.from_json(raw["fastmllm"], origin))
    return blueprint
