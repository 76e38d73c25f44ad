"""Image paths of fresh compositions: connectors of any kind on tiles or on native grids, and CogAgent's two towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.data.resolution.plan import Plan
from fastmllm.models.composition import MLLMConfig
from fastmllm.models.encoder import segment_bounds
from fastmllm.models.eva import EvaVisionTransformer
from fastmllm.models.families.parts import TilePath
from fastmllm.models.image_path import ImagePath, Seen, Visual
from fastmllm.models.tower import Features, cut
from fastmllm.models.vision import VisionConfig, VisionTransformer
from fastmllm.modules.abstractor import CAbstractor
from fastmllm.modules.ldp import LDPv2
from fastmllm.modules.projector import Projector
from fastmllm.modules.qformer import ImageTokens, QFormer, QFormerConfig
from fastmllm.modules.resampler import PerceiverResampler, ResamplerConfig
from fastmllm.modules.token_packer import TokenPacker

Grid = Sequence[Sequence[int]]


class Queries(nn.Module):
    """A Q-Former and a linear layer to the language model's width, as BLIP-2 has them (arXiv 2301.12597).

    Args:
        config: of the Q-Former, without text.
        width: of the language model.
    """

    def __init__(self, config: QFormerConfig, width: int) -> None:
        super().__init__()
        self.qformer, self.projection = QFormer(config), nn.Linear(config.width, width)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return Q, whatever the grid."""
        return self.qformer.config.num_queries

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Read images (I, N, Dv), or (M, Dv) packed with their grids; return (I, Q, D) or (I * Q, D)."""
        media, bounds, longest = _packed(x, grid)
        y = self.projection(self.qformer(ImageTokens.of_images(media, bounds, longest)))
        return y if x.dim() == 2 else y.unflatten(0, (len(x), -1))


class Latents(nn.Module):
    """A Perceiver resampler.

    Args:
        config: of the resampler.
    """

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.resampler = PerceiverResampler(config)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return L, whatever the grid."""
        return self.resampler.config.num_latents

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Read images (I, N, Dv), or (M, Dv) packed with their grids; return (I, L, D) or (I * L, D)."""
        y = self.resampler(*_packed(x, grid))
        return y if x.dim() == 2 else y.unflatten(0, (len(x), -1))


class Levels(nn.Module):
    """A TokenPacker behind an encoder that joins several layers: the last one is the coarse one.

    Args:
        packer: over all of them.
        width: of one layer.
    """

    def __init__(self, packer: TokenPacker, width: int) -> None:
        super().__init__()
        self.packer, self.width = packer, width

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return the tokens that a grid of rows x columns becomes."""
        return self.packer.num_tokens(rows, columns)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Pack (I, N, L * Dv), or (M, L * Dv) with their grids."""
        return self.packer(x[..., -self.width :], x, grid)


class AsItIs(nn.Module):
    """No connector: layers that look across read the encoder's tokens."""

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Return `x`."""
        return x


def _packed(x: Tensor, grid: Grid | None) -> tuple[Tensor, Tensor, int]:
    """Return packed tokens (M, D), their boundaries (I + 1,) int32, and the longest image."""
    lengths = [x.shape[1]] * len(x) if x.dim() == 3 else [h * w for h, w in grid or ()]
    return (x.flatten(0, 1) if x.dim() == 3 else x, *segment_bounds(lengths, x.device))


def make_connector(config: MLLMConfig, width_in: int) -> tuple[nn.Module, int]:
    """Make the connector behind a `VisionTransformer`.

    Args:
        config: of the composition.
        width_in: of the encoder's tokens, all layers side by side.

    Returns:
        The connector, (I, N, width_in) or packed (M, width_in) with grids, and the width that it makes.
    """
    encoder, sizes, width = config.encoder, config.connector_sizes, config.language.width
    assert isinstance(encoder, VisionConfig)
    inner = encoder.width if sizes.width is None else sizes.width
    if config.connector == "none":
        return AsItIs(), width_in
    if config.connector == "resampler":
        shape: dict[str, Any] = {"num_latents": sizes.tokens, "depth": sizes.depth, "num_heads": sizes.num_heads,
                 "head_dim": sizes.head_dim}  # fmt: skip
        if config.fusion in ("flamingo", "idefics"):
            make = ResamplerConfig.flamingo if config.fusion == "flamingo" else ResamplerConfig.idefics
            return Latents(make(width=width_in, **shape)), width_in
        hidden = 4 * width if sizes.mlp_width is None else sizes.mlp_width
        grouped = {**shape, "num_kv_heads": sizes.num_heads}
        return Latents(
            ResamplerConfig.idefics2(width=width, media_width=width_in, projection_width=hidden, **grouped)
        ), width
    if config.connector == "qformer":
        queries = QFormerConfig(
            width=inner, depth=sizes.depth, num_heads=sizes.num_heads, media_width=width_in, num_queries=sizes.tokens,
            mlp_width=4 * inner if sizes.mlp_width is None else sizes.mlp_width,
        )  # fmt: skip
        return Queries(queries, width), width
    if config.connector == "abstractor":
        grid = encoder.image_size // encoder.patch_size
        return CAbstractor(width_in, width, width=inner, depth=sizes.depth, side=sizes.side, grid=grid), width
    if config.connector == "ldp":
        return LDPv2(width_in, width, pool=sizes.block), width
    if config.connector == "token_packer":
        packer = TokenPacker(
            encoder.width, width, levels=len(encoder.layers), width=inner, head_dim=sizes.head_dim, region=sizes.block
        )
        return Levels(packer, encoder.width), width
    shuffled = config.connector == "pixel_shuffle"
    return Projector(width_in, width, shuffle=sizes.block if shuffled else 1, norm=shuffled), width


class GridPath(ImagePath):
    """Encode images of different sizes by a `VisionTransformer`, packed.

    Args:
        vision: the encoder.
        connector: packed (M, Dv) with grids -> (N, D).
        width: D.
        block: side of the block of patches that becomes one token, where the tokens still are a grid; else None.
    """

    def __init__(self, vision: VisionTransformer, connector: nn.Module, width: int, block: int | None) -> None:
        super().__init__()
        self.vision, self.connector, self.width = vision, connector, width
        self.merge_size, self.keeps_grid = block or 1, block is not None

    def units(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the patches of each image."""
        return [h * w for h, w in arguments["grids"]]

    def part(self, arguments: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
        """Return the arguments of some of the images, for `encode`."""
        pixels = cut(arguments["pixels"], self.units(arguments), first, last)
        return {"pixels": pixels, "grids": arguments["grids"][first:last]}

    def encode(self, arguments: Mapping[str, Any]) -> Features:
        """Encode a flat uint8 buffer of images with grids (h, w) in patches."""
        return (self.vision.forward_packed(arguments["pixels"], arguments["grids"]),)

    def connect(self, features: Features, arguments: Mapping[str, Any]) -> Visual:
        """Project the images by their grids."""
        return Visual(tokens=self.connector(features[0], arguments["grids"]))

    def blank(self) -> dict[str, Any]:
        """Return an image of zeros that is one block."""
        values = (self.merge_size * self.vision.config.patch_size) ** 2 * 3
        return {"pixels": torch.zeros(values, dtype=torch.uint8), "grids": [(self.merge_size, self.merge_size)]}

    def take(self, tiles: Sequence[tuple[Tensor, ...]], plans: Sequence[Plan]) -> Seen:
        """Take images, each of its own size."""
        shapes = [plan.grid_thw for plan in plans if plan.grid_thw is not None]
        grids = [(h, w) for _, h, w in shapes]
        arguments = {"pixels": torch.cat([image[0].flatten() for image in tiles]), "grids": grids}
        if self.keeps_grid:
            return Seen(arguments=arguments, grids=shapes)
        return Seen(arguments=arguments, counts=[self.connector.num_tokens(h, w) for h, w in grids])  # type: ignore[operator]


class DualPath(TilePath):
    """Encode each image twice: small for the text, large for modules that look at it (CogAgent, arXiv 2312.08914).

    Args:
        vision: the encoder of the small image.
        connector: behind it.
        width: of the language model.
        high: the encoder of the large image; it has no connector.
    """

    def __init__(self, vision: VisionTransformer, connector: nn.Module, width: int, high: EvaVisionTransformer) -> None:
        super().__init__(vision, connector, width)
        self.high, self.across_width = high, high.width

    def towers(self) -> Sequence[nn.Module]:
        """Return both encoders."""
        return self.vision, self.high

    def part(self, arguments: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
        """Return both views of some of the images, for `encode`."""
        high = cut(arguments["high"], self.units(arguments), first, last)
        return {**super().part(arguments, first, last), "high": high}

    def units(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the patches of each image, both views together."""
        beside = (self.high.config.image_size // self.high.config.patch_size) ** 2
        return [inside + beside for inside in super().units(arguments)]

    def encode(self, arguments: Mapping[str, Any]) -> Features:
        """Encode small images as `TilePath`, and large ones (I, S, S, 3)."""
        return *super().encode(arguments), self.high(arguments["high"]).flatten(0, 1)

    def connect(self, features: Features, arguments: Mapping[str, Any]) -> Visual:
        """Project the small images."""
        return replace(super().connect(features, arguments), across=features[1])

    def blank(self) -> dict[str, Any]:
        """Return an image of zeros for both encoders."""
        side = self.high.config.image_size
        return {**super().blank(), "high": torch.zeros(1, side, side, 3, dtype=torch.uint8)}

    def take(self, tiles: Sequence[tuple[Tensor, ...]], plans: Sequence[Plan]) -> Seen:
        """Take both views of each image."""
        small = super().take(tiles, plans)
        high = torch.cat([image[1] for image in tiles])
        return Seen(arguments={**small.arguments, "high": high}, counts=small.counts)
