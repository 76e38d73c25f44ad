"""One file a family of checkpoints: from its config.json to a model and the table of its names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastmllm.models.packing import Packing
from fastmllm.models.weights.values import named, read_flag, read_part

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


# the whole model's config.json takes over what its text_config says of a tied head (transformers 5.17 and 5.23)
_TEXT_DECIDES_TOO = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl")


def tied(raw: Mapping[str, Any], origin: str = "config.json") -> bool:
    """Say whether the head is the embedding table, as the family's class in transformers decides.

    Args:
        raw: config.json.
        origin: what the messages call it.
    """
    name, kind, text = "tie_word_embeddings", raw["model_type"], read_part(raw, "text_config", origin, {})
    if kind == "mllama":  # never, whatever it says
        return False
    if kind in ("blip-2", "instructblip"):  # the language model has its own head
        return read_flag(text, name, text.get("model_type", "opt") == "opt", origin)
    whole = read_flag(raw, name, kind == "internvl", origin)
    return whole or (kind in _TEXT_DECIDES_TOO and read_flag(text, name, False, origin))


def untied(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that says of the same model that its head is not the embedding table."""
    if raw["model_type"] == "fastmllm":
        return {**raw, "language": {**raw["language"], "tie_embeddings": False}}
    own = {**raw, "tie_word_embeddings": False}
    if raw.get("text_config"):
        own["text_config"] = {**raw["text_config"], "tie_word_embeddings": False}
    return own


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
        with named(origin):
            blueprint: Blueprint = import_module(f"{__name__}.{FAMILIES[kind]}").build(raw, origin)
            if "fastmllm" in raw:  # a fresh composition, written as one of the families
                blueprint = replace(blueprint, packing=Packing.from_json(raw["fastmllm"], origin))
    except (RuntimeError, TypeError, OverflowError) as error:  # more rows or bytes than an int64 counts
        name, size = _largest(raw)
        raise ValueError(
            f"fastmllm::MLLM: {origin} says sizes that no tensor has ({str(error).partition(chr(10))[0]}); its largest "
            f"number is {name} {size}"
        ) from error
    return blueprint


def _largest(raw: Mapping[str, Any], inside: str = "") -> tuple[str, float]:
    """Find the largest number of a config.json, and its key."""
    found = [
        _largest(value, f"{inside}{name}.") if isinstance(value, Mapping) else (inside + name, value)
        for name, value in raw.items()
        if isinstance(value, Mapping | int | float)
    ]
    return max(found, key=lambda pair: pair[1], default=("", 0))
