"""LLaVA-NeXT and LLaVA-OneVision (arXiv 2408.03326): an overview and tiles, joined again with newlines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.data.resolution.anyres import ONEVISION_PINPOINTS, PINPOINTS, AnyRes
from fastmllm.data.resolution.plan import Plan, Regrid
from fastmllm.models.families import tied
from fastmllm.models.families.llava import ALIASES, blueprint
from fastmllm.models.families.parts import (
    TilePath,
    decoder,
    feature_tower,
    host_list,
    placeholder,
)
from fastmllm.models.image_path import Seen, Visual
from fastmllm.models.mllm import Blueprint
from fastmllm.models.tower import Features
from fastmllm.models.vision import VisionTransformer
from fastmllm.models.weights.connectors import read_projector
from fastmllm.models.weights.mapping import Rule
from fastmllm.models.weights.values import named, read_pairs, read_part
from fastmllm.modules.anyres import AnyResPacker


class AnyResPath(TilePath):
    """Encode and project all tiles in one call, and join those of each image.

    Args:
        vision: the encoder.
        connector: to the language model's width.
        width: of the language model.
        policy: how an image's size chose its tiles.
    """

    def __init__(self, vision: VisionTransformer, connector: nn.Module, width: int, policy: AnyRes) -> None:
        super().__init__(vision, connector, width)
        self.policy, self.packer = policy, AnyResPacker(width)

    def connect(self, features: Features, arguments: Mapping[str, Any]) -> Visual:
        """Project tiles and join them; `regrids` say how those of each image lie."""
        regrids: Sequence[Regrid | None] = arguments["regrids"]
        return Visual(tokens=self.packer(self.project(features[0], arguments["tiles"]), regrids)[0])

    def read(self, batch: Mapping[str, Any]) -> Seen | None:
        """Take `pixel_values` (I, most tiles, 3, H, W) and `image_sizes` (I, 2), height first, out of a batch."""
        pixels, sizes = batch.get("pixel_values"), batch.get("image_sizes")
        for name in ("pixel_values_videos", "image_sizes_videos"):
            if batch.get(name) is not None:
                raise ValueError(f"fastmllm::MLLM: {name}: videos are not packed here for this family")
        if pixels is None or not len(pixels):
            return None
        if sizes is None:
            raise ValueError("fastmllm::MLLM: pixel_values come with image_sizes, (height, width) of each image")
        alone = [True] * len(sizes)
        if batch.get("batch_num_images") is not None:
            numbers = [int(n) for n in batch["batch_num_images"]]
            alone = [n == 1 for n in numbers for _ in range(n)]
            if len(alone) != len(sizes):
                raise ValueError(
                    f"fastmllm::MLLM: batch_num_images {numbers[:8]} name {len(alone)} images, but image_sizes "
                    f"{len(sizes)}"
                )
        regrids = [
            self.policy.plan(width, height).regrid if tiled else None
            for (height, width), tiled in zip(host_list(sizes), alone, strict=True)
        ]
        counts = [1 if r is None else 1 + r.rows * r.columns for r in regrids]
        if pixels.dim() == 5:
            if len(pixels) != len(sizes):
                raise ValueError(f"fastmllm::MLLM: {len(pixels)} pixel_values, but image_sizes of {len(sizes)} images")
            pixels = torch.cat([image[:n] for image, n in zip(pixels, counts, strict=True)])
        if len(pixels) != sum(counts):
            raise ValueError(
                f"fastmllm::MLLM: {len(pixels)} tiles, but images of {host_list(sizes)[:4]} have {counts[:4]}"
            )
        arguments = self.arguments(pixels) | {"regrids": regrids}
        base = self.num_tokens(arguments["grid"]) + 1
        return Seen(arguments=arguments, counts=[base if r is None else r.num_tokens for r in regrids])

    def take(self, tiles: Sequence[tuple[Tensor, ...]], plans: Sequence[Plan]) -> Seen:
        """Take an overview and tiles of each image."""
        regrids = [plan.regrid for plan in plans]
        arguments = {**super().take(tiles, plans).arguments, "regrids": regrids}
        base = self.num_tokens(arguments["grid"]) + 1
        return Seen(arguments=arguments, counts=[base if r is None else r.num_tokens for r in regrids])

    def blank(self) -> dict[str, Any]:
        """Return one tile of zeros, which is all of its image."""
        return {**super().blank(), "regrids": [None]}


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of a LLaVA-NeXT or a LLaVA-OneVision."""
    onevision = raw["model_type"] == "llava_onevision"
    vision, text = read_part(raw, "vision_config", origin), read_part(raw, "text_config", origin)
    tower, _ = feature_tower(raw, vision, origin, -1 if onevision else -2)
    kind = "qwen2" if onevision else "llama"
    language = decoder(text, f"{origin} (text_config)", tied=tied(raw, origin), kind=kind)
    width = language.config.width
    connector, rules = read_projector(raw, tower.module.config.width, width, origin)
    with named(origin):
        policy = AnyRes(
            image_size=tower.module.config.image_size, patch_size=tower.module.config.patch_size,
            pinpoints=read_pairs(
                raw, "image_grid_pinpoints", ONEVISION_PINPOINTS if onevision else PINPOINTS, origin
            ),
            max_tiles=_most_tiles(raw, origin) if onevision else None,
        )  # fmt: skip
    return blueprint(
        tower, AnyResPath(tower.module, connector, width, policy), language, rules,
        token=placeholder(raw, 151646 if onevision else 32000, origin),
        more=[Rule("images.packer.newline", "image_newline")],
        aliases=(*ALIASES, ("model.image_newline", "image_newline")),
    )  # fmt: skip


def _most_tiles(raw: Mapping[str, Any], origin: str) -> int:
    ratio = raw.get("vision_aspect_ratio", "anyres_max_9")
    found = re.fullmatch(r"anyres_max_([0-9]{1,9})", ratio) if isinstance(ratio, str) else None
    if found is None:
        raise ValueError(f"fastmllm::MLLM: {origin}: vision_aspect_ratio {ratio!r} is not computed here (anyres_max_k)")
    return int(found[1])
