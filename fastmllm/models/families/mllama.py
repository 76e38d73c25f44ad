"""Llama-3.2-Vision: tiles through a gated tower, cross-attention layers between Llama's (arXiv 2407.21783, §7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.data.resolution.plan import Plan
from fastmllm.models.checkpoint import Layout
from fastmllm.models.families import tied
from fastmllm.models.families.parts import decoder
from fastmllm.models.image_path import ImagePath, Seen, Visual
from fastmllm.models.mllama_vision import MllamaVision
from fastmllm.models.mllm import Blueprint
from fastmllm.models.tower import Features
from fastmllm.models.tower import cut as cut_units
from fastmllm.models.weights.fusion import MLLAMA_CROSS, mllama_cross_config
from fastmllm.models.weights.language import LAYER_RULES
from fastmllm.models.weights.mapping import Rule, prefixed
from fastmllm.models.weights.mllama_vision import mllama_vision_config, mllama_vision_rules
from fastmllm.models.weights.values import read_part
from fastmllm.modules.cross_attention import GatedCrossAttention

ALIASES = (
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
CROSS_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)


class MllamaPath(ImagePath):
    """Encode the tiles of images, real ones only, and project them to the language model's width.

    Args:
        vision: the tower.
        width: of the language model.
    """

    def __init__(self, vision: MllamaVision, width: int) -> None:
        super().__init__()
        self.vision, self.width = vision, width
        self.projector = nn.Linear(vision.config.out_width, width)

    def units(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the rows of each image: its tiles see each other."""
        return [self.vision.num_tokens(n) for n in arguments["aspect_ratio_ids"]]

    def part(self, arguments: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
        """Return the arguments of some of the images, for `encode`."""
        tiles = cut_units(arguments["tiles"], self.units(arguments), first, last)
        return {**arguments, "tiles": tiles, "aspect_ratio_ids": arguments["aspect_ratio_ids"][first:last]}

    def encode(self, arguments: Mapping[str, Any]) -> Features:
        """Encode tiles (P, 3, H, W), in 0..1, of images whose aspect ratios say how many each has."""
        return (self.vision(arguments["tiles"], arguments["aspect_ratio_ids"], arguments.get("layout", "chw")),)

    def connect(self, features: Features, arguments: Mapping[str, Any]) -> Visual:
        """Project all rows."""
        return Visual(tokens=self.projector(features[0]))

    def take(self, tiles: Sequence[tuple[Tensor, ...]], plans: Sequence[Plan]) -> Seen:
        """Take up to `max_tiles` tiles of each image, as its grid says."""
        ratios = self.vision.config.aspect_ratios
        if unknown := [plan.grid for plan in plans if plan.grid not in ratios]:
            raise ValueError(f"fastmllm::MLLM: tiles in {unknown[0]} rows and columns are not in {ratios}")
        ids = [ratios.index(plan.grid) + 1 for plan in plans]
        arguments = {"tiles": torch.cat([image[0] for image in tiles]), "aspect_ratio_ids": ids, "layout": "hwc"}
        return Seen(arguments=arguments, counts=[self.vision.num_tokens(n) for n in ids])

    def blank(self) -> dict[str, Any]:
        """Return one tile of zeros, which is all of its image."""
        config = self.vision.config
        tile = torch.zeros(1, config.tile_size, config.tile_size, 3, dtype=torch.uint8)
        return {"tiles": tile, "aspect_ratio_ids": [config.aspect_ratios.index((1, 1)) + 1], "layout": "hwc"}

    def read(self, batch: Mapping[str, Any]) -> Seen | None:
        """Take `pixel_values` (B, I, tiles, 3, H, W), `aspect_ratio_ids` and the masks out of a processor's batch."""
        pixels = batch.get("pixel_values")
        if pixels is None or not pixels.numel():
            return None
        for name in ("aspect_ratio_ids", "cross_attention_mask"):
            if batch.get(name) is None:
                raise ValueError(f"fastmllm::MLLM: pixel_values of Llama-3.2-Vision come with {name}")
        ids, mask = batch["aspect_ratio_ids"], batch["cross_attention_mask"]
        if len(pixels) != len(batch["input_ids"]) or ids.shape != pixels.shape[:2]:
            raise ValueError(
                f"fastmllm::MLLM: pixel_values {tuple(pixels.shape[:2])} and aspect_ratio_ids {tuple(ids.shape)} must "
                f"be (B, I, ...), B the {len(batch['input_ids'])} samples of input_ids"
            )
        if mask.shape != (*batch["input_ids"].shape, *pixels.shape[1:3]):
            raise ValueError(
                f"fastmllm::MLLM: cross_attention_mask {tuple(mask.shape)} must be (B, L, I, tiles), I and tiles as in "
                f"pixel_values {tuple(pixels.shape[1:3])}"
            )
        config = self.vision.config
        numbers = [int(n) for n in ids.flatten()]
        used = torch.tensor([self.vision.num_tiles(n) if n else 0 for n in numbers])  # 0: the batch's padding
        real = torch.arange(pixels.shape[2]) < used[:, None]  # (B * I, tiles)
        mean, std = (torch.tensor(v)[:, None, None] for v in (config.pixel_mean, config.pixel_std))
        place = (real.flatten().cumsum(0) - real.flatten().long()).view(len(pixels), -1)  # of each tile among real ones
        seen = (mask != 0).flatten(2) & real.view(len(pixels), 1, -1)
        start, stop = runs_of_real(seen, place)
        each = config.tile_tokens
        return Seen(
            arguments={"tiles": pixels.flatten(0, 2)[real.flatten()].float() * std + mean,
                       "aspect_ratio_ids": [n for n in numbers if n]},
            media=((start * each).int(), (stop * each).int(), int((stop - start).max()) * each),
        )  # fmt: skip


def runs_of_real(seen: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Return which packed tiles each row sees: seen (B, L, M) of padded tiles, place (B, M) among the packed ones."""
    last = place.shape[-1] - 1
    order = torch.arange(last + 1)
    first = torch.where(seen, order, last + 1).amin(-1).clamp(max=last)
    end = torch.where(seen, order, -1).amax(-1)
    none = end < 0
    start = place.gather(1, first)
    stop = place.gather(1, end.clamp(min=0)) + 1
    if bool(((stop - start != seen.sum(-1)) & ~none).any()):
        raise ValueError(
            "fastmllm::MLLM: a row of cross_attention_mask sees tiles that are not neighbours: not computed here"
        )
    return torch.where(none, 0, start), torch.where(none, 0, stop)


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of a Llama-3.2-Vision. Rows before the first image see none: Meta's policy, not transformers'."""
    text, inside = read_part(raw, "text_config", origin), f"{origin} (text_config)"
    language = decoder(text, inside, tied=tied(raw, origin), kind="mllama_text_model")
    crossing = text.get("cross_attention_layers")
    crossing = CROSS_LAYERS if crossing is None else tuple(crossing)
    config = mllama_cross_config(text, inside)
    rules: list[Rule] = []
    own = 0  # self-attention layers so far
    for layer in range(language.config.depth + len(crossing)):
        theirs = f"language_model.model.layers.{layer}."
        if layer not in crossing:
            rules += prefixed(LAYER_RULES, f"language.model.layers.{own}.", theirs)
            own += 1
        elif str(own) in language.cross_layers:
            raise ValueError(f"fastmllm::MLLM: {origin}: two cross_attention_layers side by side are not computed here")
        else:
            language.cross_layers[str(own)] = GatedCrossAttention(config)
            rules += prefixed(MLLAMA_CROSS, f"language.cross_layers.{own}.", theirs)
    vision = mllama_vision_config(read_part(raw, "vision_config", origin), f"{origin} (vision_config)")
    return Blueprint(
        images=MllamaPath(MllamaVision(vision), language.config.width),
        language=language,
        layout=Layout(
            rules=[
                *prefixed(mllama_vision_rules(vision), "images.vision.", "vision_model."),
                Rule("images.projector.{p}", "multi_modal_projector.{p}"),
                *rules,
                Rule("language.model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
                Rule("language.model.norm.weight", "language_model.model.norm.weight"),
                Rule("language.lm_head.weight", "language_model.lm_head.weight"),
            ],
            aliases=ALIASES,
            tied=language.config.tie_embeddings,
        ),
    )
