"""Vision tower of Llama-3.2-Vision (arXiv 2407.21783, section 7): up to four tiles of an image, seen together.

Shapes: I images of A tiles each at most, P the packed real tiles, S = 1 + patches the tokens of a tile, D the width.

A tower that computes what the published one computes cannot leave padding out: each tile is padded to a multiple of 8
rows, each image to A tiles, and only pairs of padding rows are masked, so that real rows attend to every padding row of
their image, and padding rows, which attend to the real ones, change from block to block. So padding rows are computed
here too, as keys and values; they get no pixels, and only real rows are returned. Rows are packed as [real rows of all
images, padding rows of all images]: a row's keys are its whole image if it is real, its image's real rows otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.kernels.attention import attention
from fastmllm.kernels.gated_residual import gated_residual
from fastmllm.models.encoder import segment_bounds
from fastmllm.modules.gelu_mlp import ACTIVATIONS, GeluMLP
from fastmllm.modules.layer_norm import LayerNorm
from fastmllm.modules.patch_embed import PatchEmbed

_MULTIPLE = 8  # rows that a tile is padded to a multiple of
ASPECT_RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class MllamaVisionConfig:
    """Describe the tower; the defaults are Llama-3.2-Vision's at 560 pixels.

    Args:
        width, num_heads, mlp_width: of the transformers.
        depth: blocks that see an image's tiles without knowing their place.
        global_depth: gated blocks behind them.
        layers: blocks of the first `depth` whose outputs are returned beside the last one's, counted from 0.
        tile_size: pixels of a tile on a side.
        max_tiles: tiles that every image is padded to.
        aspect_ratios: arrangements of tiles; an image's aspect_ratio_id is the place in this list, counted from 1.
        activation: "gelu", "gelu_tanh" or "quick_gelu".
        norm_eps: of the blocks' norms; the others have 1e-5.
        pixel_mean, pixel_std: per channel, in units of 0..1.
    """

    width: int = 1280
    depth: int = 32
    global_depth: int = 8
    num_heads: int = 16
    mlp_width: int = 5120
    layers: tuple[int, ...] = (3, 7, 15, 23, 30)
    tile_size: int = 560
    patch_size: int = 14
    channels: int = 3
    max_tiles: int = 4
    aspect_ratios: tuple[tuple[int, int], ...] = ASPECT_RATIOS
    activation: str = "gelu"
    norm_eps: float = 1e-5
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        sizes = (self.width, self.depth, self.global_depth, self.num_heads, self.mlp_width, self.patch_size)
        if min(*sizes, self.channels, self.max_tiles) < 1 or not self.aspect_ratios:
            raise ValueError(f"MllamaVisionConfig: every size must be at least 1, got {self}")
        if self.width % self.num_heads:
            raise ValueError(f"MllamaVisionConfig: width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.tile_size < self.patch_size or self.tile_size % self.patch_size:
            raise ValueError(
                f"MllamaVisionConfig: tile_size {self.tile_size} is not a multiple of patch_size {self.patch_size}"
            )
        if not self.layers or any(not 0 <= k < self.depth for k in self.layers):
            raise ValueError(f"MllamaVisionConfig: layers {self.layers} must be some of 0..{self.depth - 1}")
        if any(not 1 <= rows * columns <= self.max_tiles for rows, columns in self.aspect_ratios):
            raise ValueError(
                f"MllamaVisionConfig: aspect_ratios {self.aspect_ratios} need more than max_tiles {self.max_tiles}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"MllamaVisionConfig: activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile, the class token among them."""
        return (self.tile_size // self.patch_size) ** 2 + 1

    @property
    def out_width(self) -> int:
        """Channels of a token: the last block's and those of `layers`."""
        return self.width * (1 + len(self.layers))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where rows stand; T = real + padding rows, and a table has a row for each pair of aspect ratio and tile."""

    tiles: Tensor  # (I * A,) int64 row of a table: all real tiles, then the padding tiles
    rows: Tensor  # (T,) int64 row of cat(tokens of `tiles`, one zero row)
    row_tiles: Tensor  # (T,) int64 row of a table
    keys: Tensor  # (T,) int64 rows, image by image
    real: tuple[Tensor, int]  # cu_seqlens (I + 1,) int32 of the real rows and its longest segment
    padding: tuple[Tensor, int]  # the same of the padding rows
    both: tuple[Tensor, int]  # and of `keys`
    num_real: int


class Attention(nn.Module):
    """Let real rows attend to all rows of their image, padding rows to its real ones; q, k and v in one product."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.width // config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, layout: _Layout) -> Tensor:
        """Transform (T, D) to (T, D)."""
        qkv = self.qkv(x).view(-1, 3, self.num_heads, self.head_dim)
        real, padding = qkv[: layout.num_real], qkv[layout.num_real :]
        seen = qkv[:, 1:].index_select(0, layout.keys)
        y = torch.cat([_attend(real, seen, layout.real, layout.both),
                       _attend(padding, real[:, 1:], layout.padding, layout.real)])  # fmt: skip
        return self.proj(y.flatten(1))


def _attend(qkv: Tensor, kv: Tensor, queries: tuple[Tensor, int], keys: tuple[Tensor, int]) -> Tensor:
    return attention(qkv[:, 0], kv[:, 0], kv[:, 1], queries[0], keys[0], queries[1], keys[1])


class Block(nn.Module):
    """One pre-LN block."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = GeluMLP(config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor, layout: _Layout) -> Tensor:
        """Transform (T, D) to (T, D)."""
        y, x = self.norm2.add(self.attn(self.norm1(x), layout), x)
        return x + self.mlp(y)


class GatedBlock(Block):
    """One pre-LN block whose branches pass a tanh gate each."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__(config)
        self.attn_gate = nn.Parameter(torch.full((1,), math.pi / 4))
        self.mlp_gate = nn.Parameter(torch.full((1,), math.pi / 4))

    def forward(self, x: Tensor, layout: _Layout) -> Tensor:
        """Transform (T, D) to (T, D)."""
        x = gated_residual(x, self.attn(self.norm1(x), layout), self.attn_gate)
        return gated_residual(x, self.mlp(self.norm2(x)), self.mlp_gate)


class MllamaVision(nn.Module):
    """Encode images that were cut into tiles.

    Args:
        config: sizes and variants.

    Equal to transformers' MllamaVisionModel for the same weights, on the tiles that are not padding, with padding tiles
    of zeros, as its processor makes them. A linear layer on the tokens is the checkpoints' `multi_modal_projector`.
    """

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.stride = config.out_width, config.patch_size
        table = (len(config.aspect_ratios) + 1, config.max_tiles)  # row 0 is of no image
        self.patch_embed = PatchEmbed(
            config.patch_size, config.width, config.channels, bias=False, mean=config.pixel_mean, std=config.pixel_std
        )
        self.cls_token = nn.Parameter(torch.zeros(config.width))
        self.position = nn.Parameter(torch.zeros(config.tile_tokens, config.width))
        self.tile_position = nn.Parameter(torch.zeros(*table, config.tile_tokens, config.width))
        self.position_gate = nn.Parameter(torch.zeros(1))
        self.pre_tile, self.pre_tile_gate = (
            nn.Parameter(torch.zeros(*table, config.width)),
            nn.Parameter(torch.zeros(1)),
        )
        self.post_tile = nn.Parameter(torch.zeros(*table, config.width))
        self.post_tile_gate = nn.Parameter(torch.zeros(1))
        self.pre_norm, self.post_norm = LayerNorm(config.width), LayerNorm(config.width)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.global_blocks = nn.ModuleList([GatedBlock(config) for _ in range(config.global_depth)])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw linear weights and positions at 0.02; gates stay at 0, and at pi / 4 in the gated blocks."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not name.startswith("patch_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def num_tiles(self, aspect_ratio_id: int) -> int:
        """Return the tiles of an image."""
        if not 1 <= aspect_ratio_id <= len(self.config.aspect_ratios):
            raise ValueError(
                f"MllamaVision: aspect_ratio_id {aspect_ratio_id} is not in 1..{len(self.config.aspect_ratios)}; leave "
                "out the images that a batch was padded with"
            )
        return math.prod(self.config.aspect_ratios[aspect_ratio_id - 1])

    def num_tokens(self, aspect_ratio_id: int) -> int:
        """Return the tokens of an image."""
        return self.num_tiles(aspect_ratio_id) * self.config.tile_tokens

    def forward(self, tiles: Tensor, aspect_ratio_ids: Sequence[int], layout: str = "hwc") -> Tensor:
        """Encode images.

        Args:
            tiles: (P, H, W, C) uint8, or floats in 0..1, the tiles of all images packed: none is padding.
                (P, C, H, W) in layout "chw".
            aspect_ratio_ids: of each image, on the host; the number of its tiles follows.
            layout: "hwc" or "chw".

        Returns:
            (P * S, out_width): for each tile its class token and its patches row by row. The last block's channels
            come first; behind them channel c of the k-th of K `layers` is at c * K + k, as in the checkpoints.

        Raises:
            ValueError: tiles do not fit the ids or the config.
        """
        config, ids = self.config, tuple(int(n) for n in aspect_ratio_ids)
        counts = tuple(self.num_tiles(n) for n in ids)
        size = tiles.shape[2:] if layout == "chw" else tiles.shape[1:3]
        if tiles.dim() != 4 or len(tiles) != sum(counts) or tuple(size) != (config.tile_size, config.tile_size):
            raise ValueError(
                f"MllamaVision: tiles {tuple(tiles.shape)} in layout {layout!r} must be {sum(counts)} (aspect ratios "
                f"{ids[:8]} have {counts[:8]}) of {config.tile_size} x {config.tile_size} pixels"
            )
        where = _layout(ids, counts, config, tiles.device)
        x = self._embed(tiles, where, layout)
        taken: dict[int, Tensor] = {}
        for k, block in enumerate(self.blocks):
            x = block(x, where)
            if k in config.layers:
                taken[k] = x[: where.num_real]
        post_tile = F.embedding(where.row_tiles, self.post_tile.flatten(0, 1))
        x = gated_residual(self.post_norm(x), post_tile, self.post_tile_gate)
        for block in self.global_blocks:
            x = block(x, where)
        features = torch.stack([taken[k] for k in config.layers], -1).flatten(1)
        return torch.cat([x[: where.num_real], features], 1)

    def _embed(self, tiles: Tensor, where: _Layout, layout: str) -> Tensor:
        """Return the rows (T, D) in front of the first block."""
        patches = self.patch_embed(tiles, layout)  # (P, S - 1, D)
        blank = patches.new_zeros(len(where.tiles) - len(patches), *patches.shape[1:])  # of padding tiles
        pre_tile = F.embedding(where.tiles, self.pre_tile.flatten(0, 1)) * self.pre_tile_gate.tanh()
        x = torch.cat([patches, blank]) + pre_tile.unsqueeze(1)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1)  # (I * A, S, D)
        tile_position = F.embedding(where.tiles, self.tile_position.flatten(0, 1).flatten(1)).view(x.shape)
        gate = self.position_gate.tanh()
        x = x + (1 - gate) * self.position + gate * tile_position
        x = self.pre_norm(x).flatten(0, 1)
        return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, where.rows)


def _layout(ids: tuple[int, ...], counts: tuple[int, ...], config: MllamaVisionConfig, device: torch.device) -> _Layout:
    index, real, padding = _plan(ids, counts, config.max_tiles, config.tile_tokens)
    tiles, rows, row_tiles, keys = (torch.from_numpy(a).to(device, non_blocking=True) for a in index)
    both = [a + b for a, b in zip(real, padding, strict=True)]
    bounds = [segment_bounds(lengths, device) for lengths in (real, padding, both)]
    return _Layout(tiles, rows, row_tiles, keys, bounds[0], bounds[1], bounds[2], sum(real))


# numpy and not tensors: one made under torch.inference_mode could not be saved for a later backward
@lru_cache(maxsize=64)
def _plan(
    ids: tuple[int, ...], counts: tuple[int, ...], max_tiles: int, tile_tokens: int
) -> tuple[tuple[np.ndarray, ...], list[int], list[int]]:
    """Return tiles, rows, row_tiles and keys of `_Layout`, and the real and the padding rows of each image."""
    pad = -tile_tokens % _MULTIPLE
    blank = len(ids) * max_tiles * tile_tokens  # the zero row
    empty = np.zeros(0, np.int64)
    tables, rows, row_tiles = ([empty], [empty]), ([empty], [empty]), ([empty], [empty])  # of real and of padding rows
    next_tile = [0, sum(counts)]
    for image, count in zip(ids, counts, strict=True):
        table = image * max_tiles + np.arange(max_tiles)
        for which, part in enumerate((table[:count], table[count:])):
            tokens = (next_tile[which] + np.arange(len(part)))[:, None] * tile_tokens + np.arange(tile_tokens)
            tables[which].append(part)
            rows[which].append(tokens.ravel())
            row_tiles[which].append(np.repeat(part, tile_tokens))
            next_tile[which] += len(part)
        rows[1].append(np.full(max_tiles * pad, blank))
        row_tiles[1].append(np.repeat(table, pad))
    real = [count * tile_tokens for count in counts]
    padding = [max_tiles * (tile_tokens + pad) - n for n in real]
    of_image = np.concatenate([np.repeat(np.arange(len(ids)), n) for n in (real, padding)])
    index = tuple(np.concatenate([*parts[0], *parts[1]]) for parts in (tables, rows, row_tiles))
    return (*index, np.argsort(of_image, kind="stable")), real, padding
