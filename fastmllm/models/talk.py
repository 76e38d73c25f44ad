"""A recipe's model of any composition, and the words around what it is shown and asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastmllm.data.text import ChatTemplate
from fastmllm.models.composition import MLLMConfig, from_json
from fastmllm.models.language import LanguageModel
from fastmllm.models.mllm import MLLM
from fastmllm.models.packing import Packing
from fastmllm.models.placing import loading_device
from fastmllm.models.vision import VisionTransformer
from fastmllm.models.vlm import native_bfloat16
from fastmllm.models.weights import load_language, load_tokenizer, load_vision


@dataclass(frozen=True, kw_only=True, slots=True)
class TalkConfig(ChatTemplate):
    """What a multimodal model is made of: a folder of a published family, or a composition; and its chat template.

    Args:
        folder: config.json and safetensors of a family of `fastmllm.models.families`, or what `save_pretrained` wrote.
        composition: fields of `MLLMConfig` as plain values, with the encoder's `kind`, for a fresh model.
        vision, language: weights of the composition's encoder (a ViT) and decoder, names or folders that `load_vision`
            and `load_language` know; the composition then leaves out `encoder` or `language`.
        tokenizer: a name or folder that `load_tokenizer` knows; None = that of `language`, else of `folder`.
        resolution: how a folder that does not say it takes pictures: name of a policy and its sizes, such as
            {name: fixed, image_size: 336, patch_size: 14}.
        sees: which pictures a row looks at across, as in `MLLM.pack`.
        image_lead, image_end: text in front of and behind each picture, such as <|vision_start|> and <|vision_end|>.
        dtype: "auto" is bfloat16 where the processor multiplies it natively, else float32.

    Raises:
        ValueError: both or neither of folder and composition, or parts that do not go together.
    """

    folder: str | None = None
    composition: Mapping[str, Any] = field(default_factory=dict)
    vision: str | None = None
    language: str | None = None
    tokenizer: str | None = None
    resolution: Mapping[str, Any] = field(default_factory=dict)
    sees: str = "latest"
    image_lead: str = ""
    image_end: str = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        ChatTemplate.__post_init__(self)
        if bool(self.folder) == bool(self.composition):
            raise ValueError("model: give either a folder or a composition")
        if self.folder and (self.vision or self.language):
            raise ValueError("model: vision and language are weights of a composition's parts; a folder has its own")
        if not (self.tokenizer or self.language or self.folder):
            raise ValueError("model: a composition has no words yet: name its tokenizer")
        for part, key in ((self.vision, "encoder"), (self.language, "language")):
            if part and key in self.composition:
                raise ValueError(f"model: composition.{key} comes with the weights of {part}; leave it out")
        if self.composition and not (self.vision or self.language):
            from_json(self.composition, "model.composition")

    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if torch.cuda.is_available() or native_bfloat16() else torch.float32
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


def load_mllm(config: TalkConfig, cache: Path | None = None, seed: int = 0) -> MLLM:
    """Load or compose a recipe's model, with its tokenizer; nothing learns yet.

    Args:
        config: the recipe's model section.
        cache: folder for converted weights, or None.
        seed: of fresh weights.

    Raises:
        ValueError: parts that do not go together, an encoder that is no ViT, or no resolution policy.
    """
    if config.folder:
        model = MLLM.from_pretrained(config.folder, config.torch_dtype())
        if config.resolution:
            model.packing = said_packing(config, model)
        if model.packing is None:
            raise ValueError(
                f"model: {config.folder} names no resolution policy; say it: resolution: {{name: fixed, image_size: "
                "336, patch_size: 14}"
            )
    else:
        model = _composed(config, cache, seed).to(config.torch_dtype())
    words = config.tokenizer or config.language or config.folder
    assert words is not None
    model.config, model.tokenizer = config, load_tokenizer(words, cache=cache)
    model.requires_grad_(False)
    return model.to(loading_device(model)).eval()


def said_packing(config: TalkConfig, model: MLLM) -> Packing:
    """Return how a folder's model takes pictures, as the recipe's `resolution` says it."""
    token = model.placeholders[0] if model.placeholders else model.checkpoint.raw.get("image_token_index", 0)
    raw = {"resolution": dict(config.resolution), "image_token_id": token}
    return Packing.from_json(raw, "model.resolution")


def composition_of(config: TalkConfig, vision: nn.Module | None, language: LanguageModel | None) -> MLLMConfig:
    """Return a recipe's composition, with the sizes of the parts that have weights.

    Raises:
        ValueError: an encoder that is no ViT, or parts that do not go together.
    """
    raw = dict(config.composition)
    if vision is not None:
        if not isinstance(vision, VisionTransformer):
            raise ValueError(f"model.vision: {config.vision} is a {type(vision).__name__}; a composition takes a ViT")
        raw["encoder"] = {"kind": "vit", **asdict(vision.config)}
    if language is not None:
        raw["language"] = asdict(language.config)
    return from_json(raw, "model.composition")


def _composed(config: TalkConfig, cache: Path | None, seed: int) -> MLLM:
    """Compose a model and fill in the weights that its parts have."""
    vision = load_vision(config.vision, torch.float32) if config.vision else None
    language = load_language(config.language, torch.float32, cache=cache) if config.language else None
    model = MLLM.from_config(composition_of(config, vision, language), seed)
    if vision is not None:
        model.images.vision.load_state_dict(vision.state_dict())  # type: ignore[union-attr, operator]
    if language is not None:
        left = model.language.load_state_dict(language.state_dict(), strict=False)
        assert not left.unexpected_keys, left.unexpected_keys
    return model
