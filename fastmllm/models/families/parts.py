"""What several families are made of: a plain encoder, a decoder, and the path from tiles to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.data.resolution.plan import Plan
from fastmllm.models.checkpoint import VISION
from fastmllm.models.image_path import ImagePath, Seen, Visual
from fastmllm.models.language import LanguageModel
from fastmllm.models.tower import Features
from fastmllm.models.tower import cut as cut_units
from fastmllm.models.vision import VisionConfig, VisionTransformer
from fastmllm.models.weights.connectors import feature_layers
from fastmllm.models.weights.language import DECODER_RULES, UNUSED, language_config
from fastmllm.models.weights.mapping import Rule, Shape, prefixed
from fastmllm.models.weights.towers import describe_stored
from fastmllm.models.weights.values import read_choice, read_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """An encoder and its part of a layout: our names begin with "images.vision."."""

    module: VisionTransformer
    whole: VisionConfig
    rules: list[Rule]
    unused: dict[str, Shape]


def vision_tower(raw: Mapping[str, Any], prefix: str, origin: str, **changes: Any) -> Tower:
    """Build the encoder that a `vision_config` describes.

    Args:
        raw: the configuration, with its model_type.
        prefix: of its names in the checkpoint.
        origin: what the messages call it.
        changes: fields of VisionConfig that the model decides, such as `layer` and `final_norm`.
    """
    stored = describe_stored(raw, f"{origin} (vision_config)", changes=changes)
    return Tower(
        module=VisionTransformer(stored.config), whole=stored.whole,
        rules=prefixed(stored.rules, VISION, prefix),
        unused={prefix + name: shape for name, shape in stored.unused.items()},
    )  # fmt: skip


def feature_tower(
    raw: Mapping[str, Any], vision: Mapping[str, Any], origin: str, default: int, *, in_a_grid: bool = True
) -> tuple[Tower, int]:
    """Build the encoder of a LLaVA or its relatives: which hidden states are features, and which rows of them.

    Args:
        raw: config.json.
        vision: its `vision_config`, with its model_type.
        origin: what the messages call it.
        default: `vision_feature_layer` where `raw` has none.
        in_a_grid: the features of a tile are laid out in two dimensions.

    Returns:
        The encoder, and how many of a tile's patches are dropped in front: the "default" strategy drops the first row,
        which is a patch where the encoder has no class token (a SigLIP in transformers' LLaVA).

    Raises:
        ValueError: the class token is among the features, or a patch would be missing in a grid.
    """
    strategy = read_choice(raw, "vision_feature_select_strategy", "default", ("default", "full"), origin)
    layer = feature_layers(raw, default, origin)
    changes: dict[str, Any] = {"layer": layer, "final_norm": False}
    if raw["model_type"] == "internvl" and layer == -1:
        changes = {}
    tower = vision_tower(vision, "vision_tower.", origin, **changes)
    has_one = tower.module.config.cls_token
    if has_one and strategy == "full":
        raise ValueError(
            f"fastmllm::MLLM: {origin}: vision_feature_select_strategy 'full' keeps the class token; only the patches "
            "('default') are computed here"
        )
    skip = int(strategy == "default" and not has_one)
    if skip and in_a_grid:
        raise ValueError(
            f"fastmllm::MLLM: {origin}: vision_feature_select_strategy 'default' drops the first patch of an encoder "
            "without a class token, so that no grid is left; write 'full'"
        )
    return tower, skip


def decoder(raw: Mapping[str, Any], origin: str, *, tied: bool, kind: str = "llama") -> LanguageModel:
    """Build the decoder that a `text_config` describes.

    Args:
        raw: the configuration.
        origin: what the messages call it.
        tied: what the whole model says of tied embeddings.
        kind: its model_type where `raw` has none.
    """
    return LanguageModel(language_config({"model_type": kind, **raw, "tie_word_embeddings": tied}, origin))


def placeholder(raw: Mapping[str, Any], default: int, origin: str) -> int:
    """Read the token that visual tokens replace, under its name of today or an older one."""
    name = "image_token_id" if "image_token_id" in raw else "image_token_index"
    return read_size(raw, name, default, origin, least=0)


def decoder_rules(body: str, head: str) -> list[Rule]:
    """Return a decoder's table: `body` stands in front of "embed_tokens", `head` in front of "lm_head"."""
    return [
        *prefixed(DECODER_RULES, "language.model.", body),
        Rule("language.lm_head.weight", f"{head}lm_head.weight"),
    ]


def decoder_unused(body: str) -> dict[str, Shape]:
    """Return what old files hold beside a decoder's parameters."""
    return {body.removesuffix("model.") + name: shape for name, shape in UNUSED.items()}


def cut(pixels: Tensor, patch_size: int) -> Tensor:
    """Cut normalised images (n, C, H, W) into patches (n * h * w, P * P * C) in (row, column, channel) order."""
    n, c, height, width = pixels.shape
    p = patch_size
    if height % p or width % p:
        raise ValueError(f"fastmllm::MLLM: images of {height} x {width} pixels are no multiples of the patch size {p}")
    blocks = pixels.reshape(n, c, height // p, p, width // p, p)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(-1, p * p * c)


def flat(tiles: Sequence[tuple[Tensor, ...]], patch_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Lay a policy's tiles (n, H, W, 3) of the first encoder in one uint8 buffer; return it and their grid (h, w).

    Raises:
        ValueError: tiles of several sizes.
    """
    sizes = {image[0].shape[1:3] for image in tiles}
    if len(sizes) != 1:
        raise ValueError(f"fastmllm::MLLM: tiles must be of one size here, got {sorted(map(tuple, sizes))}")
    height, width = sizes.pop()
    h, w = height // patch_size, width // patch_size
    kept = slice(h * patch_size), slice(w * patch_size)  # a part of a patch is not seen
    return torch.cat([image[0][:, *kept].flatten() for image in tiles]), (h, w)


def blank_tile(config: VisionConfig) -> tuple[Tensor, tuple[int, int]]:
    """Return a tile of zeros of an encoder's own size, a flat uint8 buffer, and its grid (h, w)."""
    side = config.image_size
    return flat([(torch.zeros(1, side, side, 3, dtype=torch.uint8),)], config.patch_size)


class TilePath(ImagePath):
    """Encode images or tiles of one size, project their tokens, and take them one after the other.

    Args:
        vision: the encoder.
        connector: (n, N, Dv) -> (n, K, D); its `num_tokens(h, w)`, where it has one, is K.
        width: D.
        skip: patches of each tile that are dropped, in front.
    """

    def __init__(self, vision: VisionTransformer, connector: nn.Module, width: int, skip: int = 0) -> None:
        super().__init__()
        self.vision, self.connector, self.width, self.skip = vision, connector, width, skip

    def units(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the patches of each tile."""
        h, w = arguments["grid"]
        return [h * w] * arguments["tiles"]

    def part(self, arguments: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
        """Return the arguments of some of the tiles, for `encode`."""
        patches = cut_units(arguments["patches"], self.units(arguments), first, last)
        return {**arguments, "patches": patches, "tiles": last - first}

    def encode(self, arguments: Mapping[str, Any]) -> Features:
        """Encode tiles of one grid (h, w): cut, (tiles * h * w, P * P * 3), or a flat uint8 buffer of them."""
        return (self.vision.forward_packed(arguments["patches"], [arguments["grid"]] * arguments["tiles"]),)

    def connect(self, features: Features, arguments: Mapping[str, Any]) -> Visual:
        """Project the tiles one by one."""
        return Visual(tokens=self.project(features[0], arguments["tiles"]).flatten(0, 1))

    def project(self, features: Tensor, tiles: int) -> Tensor:
        """Return (tiles, K, D)."""
        return self.connector(features.unflatten(0, (tiles, -1))[:, self.skip :])

    def read(self, batch: Mapping[str, Any]) -> Seen | None:
        """Take `pixel_values` (n, 3, H, W) out of a processor's batch."""
        pixels = batch.get("pixel_values")
        if pixels is None or not len(pixels):
            return None
        arguments = self.arguments(pixels)
        return Seen(arguments=arguments, counts=[self.num_tokens(arguments["grid"])] * len(pixels))

    def take(self, tiles: Sequence[tuple[Tensor, ...]], plans: Sequence[Plan]) -> Seen:
        """Take tiles of one size."""
        patches, grid = flat(tiles, self.vision.config.patch_size)
        counts = [len(image[0]) for image in tiles]
        each = self.num_tokens(grid)
        return Seen(
            arguments={"patches": patches, "tiles": sum(counts), "grid": grid}, counts=[n * each for n in counts]
        )

    def blank(self) -> dict[str, Any]:
        """Return one tile of zeros."""
        patches, grid = blank_tile(self.vision.config)
        return {"patches": patches, "tiles": 1, "grid": grid}

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return K for a tile of (h, w) patches."""
        count = getattr(self.connector, "num_tokens", None)
        return (grid[0] * grid[1] if count is None else int(count(*grid))) - self.skip

    def arguments(self, pixels: Tensor) -> dict[str, Any]:
        """Return the arguments of `forward` for normalised tiles (n, 3, H, W)."""
        if pixels.dim() != 4:
            raise ValueError(f"fastmllm::MLLM: pixel_values must be (n, 3, H, W), got {tuple(pixels.shape)}")
        p, size = self.vision.config.patch_size, self.vision.config.image_size
        if pixels.shape[2:] == (size, size):  # 384 with patches of 14: a part of a patch is not seen
            pixels = pixels[..., : size - size % p, : size - size % p]
        grid = (pixels.shape[2] // p, pixels.shape[3] // p)
        return {"patches": cut(pixels, p), "tiles": len(pixels), "grid": grid}


class WholePath(ImagePath):
    """Encode images of one size, their class tokens included.

    A family's path reads them (`connect`). Its arguments: patches, images and grid.
    """

    def units(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the patches of each image."""
        h, w = arguments["grid"]
        return [h * w] * arguments["images"]

    def part(self, arguments: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
        """Return the arguments of some of the images, for `encode`."""
        patches = cut_units(arguments["patches"], self.units(arguments), first, last)
        return {**arguments, "patches": patches, "images": last - first}

    def encode(self, arguments: Mapping[str, Any]) -> Features:
        """Encode images: cut, (images * h * w, P * P * 3), or a flat uint8 buffer of them."""
        grids = [arguments["grid"]] * arguments["images"]
        return (self.vision.forward_packed(arguments["patches"], grids, class_token=True),)

    def blank(self) -> dict[str, Any]:
        """Return one image of zeros."""
        patches, grid = blank_tile(self.vision.config)
        return {"patches": patches, "images": 1, "grid": grid}


def host_list(values: Tensor | Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return rows of integers as tuples."""
    rows = values.tolist() if isinstance(values, torch.Tensor) else values
    return [tuple(int(v) for v in row) for row in rows]
