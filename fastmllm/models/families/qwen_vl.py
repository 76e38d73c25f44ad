"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images at their own size, M-RoPE; Qwen3-VL's DeepStack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.data.resolution.plan import Plan
from fastmllm.models.checkpoint import Layout
from fastmllm.models.families import tied
from fastmllm.models.families.parts import decoder, decoder_rules, decoder_unused, host_list
from fastmllm.models.image_path import ImagePath, Seen, Visual
from fastmllm.models.mllm import Blueprint
from fastmllm.models.qwen_vision import QwenVision, QwenVisionConfig
from fastmllm.models.tower import Features, cut
from fastmllm.models.weights.mapping import prefixed
from fastmllm.models.weights.qwen_vision import (
    qwen2_5_vision_config,
    qwen2_vision_config,
    qwen3_vision_config,
    qwen_vision_rules,
)
from fastmllm.models.weights.values import read_number, read_part, read_size


@dataclass(frozen=True, kw_only=True, slots=True)
class _Variant:
    """What differs among the three.

    Args:
        vision: reads `vision_config`.
        text: model_type of the decoder.
        seconds: frames of a video lie as far apart in position as in time, `tokens_per_second` a second.
        frames_apart: a video's frames stand in the text one by one, each a grid of its own.
        visual, body, head: prefixes in files.
    """

    vision: Callable[[Mapping[str, Any], str], QwenVisionConfig]
    text: str
    seconds: bool = False
    frames_apart: bool = False
    visual: str = "visual."
    body: str = "model."
    head: str = ""


VARIANTS = {
    "qwen2_vl": _Variant(vision=qwen2_vision_config, text="qwen2_vl_text"),
    "qwen2_5_vl": _Variant(vision=qwen2_5_vision_config, text="qwen2_5_vl_text", seconds=True),
    "qwen3_vl": _Variant(
        vision=qwen3_vision_config, text="qwen3_vl_text", frames_apart=True, visual="model.visual.",
        body="model.language_model.",
    ),
}  # fmt: skip
_TODAY = {"visual.": "model.visual.", "model.": "model.language_model."}  # transformers 5 at run time


class NativePath(ImagePath):
    """Encode images and videos at their own sizes, packed.

    Args:
        vision: the tower; its merger is the connector.
        image_token, video_token: their placeholders.
        tokens_per_second: positions a second of video, or None: one a temporal patch.
        frames_apart: as in `_Variant`.
    """

    def __init__(
        self, vision: QwenVision, image_token: int, video_token: int, tokens_per_second: float | None,
        frames_apart: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vision, self.width, self.merge_size = vision, vision.width, vision.config.merge_size
        self.image_token, self.video_token = image_token, video_token
        self.tokens_per_second, self.frames_apart = tokens_per_second, frames_apart

    def towers(self) -> Sequence[nn.Module]:
        """Return what is in front of the mergers."""
        return self.vision.patch_embed, self.vision.blocks

    def units(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the patches of each image or video."""
        return [t * h * w for t, h, w in arguments["grids"]]

    def part(self, arguments: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
        """Return the arguments of some of the images and videos, for `encode`."""
        patches = cut(arguments["patches"], self.units(arguments), first, last)
        return {"patches": patches, "grids": arguments["grids"][first:last]}

    def encode(self, arguments: Mapping[str, Any]) -> Features:
        """Encode patches (M, C * T * P * P) of all grids (t, h, w), or a flat uint8 buffer of single images."""
        patches, grids = arguments["patches"], arguments["grids"]
        images = (patches, grids) if patches.dim() == 2 else (self._images(patches, grids),)
        return self.vision.encode(*images)[0]

    def connect(self, features: Features, arguments: Mapping[str, Any]) -> Visual:
        """Merge patches into tokens."""
        seen = self.vision.merge(features, tuple((t, h, w) for t, h, w in arguments["grids"]))
        return Visual(tokens=seen.tokens, planes=seen.planes)

    def blank(self) -> dict[str, Any]:
        """Return an image of zeros that is one visual token."""
        config = self.vision.config
        values = (self.merge_size * config.patch_size) ** 2 * config.channels
        grid = (1, self.merge_size, self.merge_size)
        return {"patches": torch.zeros(values, dtype=torch.uint8), "grids": [grid]}

    def read(self, batch: Mapping[str, Any]) -> Seen | None:
        """Take `pixel_values` and `image_grid_thw`, and the same of videos, out of a batch."""
        parts = {self.image_token: self._part(batch, "pixel_values", "image_grid_thw"),
                 self.video_token: self._part(batch, "pixel_values_videos", "video_grid_thw")}  # fmt: skip
        if not any(grids for _, grids in parts.values()):
            return None
        seconds = batch.get("second_per_grid_ts")
        videos = len(parts[self.video_token][1])
        apart = [1.0] * videos if seconds is None else [float(s) for s in seconds]
        if len(apart) != videos:
            raise ValueError(f"fastmllm::MLLM: second_per_grid_ts names {len(apart)} videos, but there are {videos}")
        kept = batch["input_ids"]
        if (mask := batch.get("attention_mask")) is not None:
            kept = kept[mask.bool()]
        order = self._order(kept.flatten().tolist(), {token: list(grids) for token, (_, grids) in parts.items()})
        patches: list[Tensor] = []
        grids: list[tuple[int, ...]] = []
        intervals: list[float] = []
        for token, k in order:
            part, all_grids = parts[token]
            assert part is not None
            patches.append(part[k])
            t, h, w = all_grids[k]
            video = token == self.video_token
            frames = [(1, h, w)] * t if self.frames_apart and video else [(t, h, w)]
            rate = 1.0 if self.tokens_per_second is None or not video else self.tokens_per_second * apart[k]
            grids += frames
            intervals += [rate] * len(frames)
        return Seen(arguments={"patches": torch.cat(patches), "grids": grids}, grids=grids, time_intervals=intervals)

    def take(self, tiles: Sequence[tuple[Tensor, ...]], plans: Sequence[Plan]) -> Seen:
        """Take images, each of its own size."""
        grids = [plan.grid_thw for plan in plans if plan.grid_thw is not None]
        return Seen(
            arguments={"patches": torch.cat([image[0].flatten() for image in tiles]), "grids": grids}, grids=grids
        )

    def _images(self, pixels: Tensor, grids: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Part a buffer into images (H, W, C)."""
        config = self.vision.config
        p, channels = config.patch_size, config.channels
        parts = pixels.split([h * w * p * p * channels for _, h, w in grids])
        return [part.view(h * p, w * p, channels) for part, (_, h, w) in zip(parts, grids, strict=True)]

    def _part(
        self, batch: Mapping[str, Any], pixels: str, grids: str
    ) -> tuple[list[Tensor] | None, list[tuple[int, ...]]]:
        if batch.get(pixels) is None:
            if batch.get(grids) is not None and len(batch[grids]):
                raise ValueError(f"fastmllm::MLLM: {grids} without {pixels}: give both or neither")
            return None, []
        if batch.get(grids) is None:
            raise ValueError(f"fastmllm::MLLM: {pixels} come with {grids}, the patches of each")
        found = host_list(batch[grids])
        lengths = [t * h * w for t, h, w in found]
        if sum(lengths) != len(batch[pixels]):
            raise ValueError(f"fastmllm::MLLM: {len(batch[pixels])} {pixels}, but {grids} has {sum(lengths)} patches")
        return list(batch[pixels].split(lengths)), found

    def _order(self, tokens: list[int], grids: dict[int, list[tuple[int, ...]]]) -> list[tuple[int, int]]:
        """Return images and videos, (placeholder, number), in the order in which the text has them."""
        order: list[tuple[int, int]] = []
        left, done = 0, dict.fromkeys(grids, 0)
        for token in tokens:
            if token not in grids:
                continue
            if left == 0:
                k = done[token]
                if k >= len(grids[token]):
                    raise ValueError(
                        f"fastmllm::MLLM: the text has more places for token {token} than there are images"
                    )
                t, h, w = grids[token][k]
                left = t * h * w // self.merge_size**2
                order.append((token, k))
                done[token] += 1
            elif token != order[-1][0]:
                raise ValueError(f"fastmllm::MLLM: token {token} stands among the {order[-1][0]} of another image")
            left -= 1
        if left or any(done[token] != len(known) for token, known in grids.items()):
            raise ValueError(f"fastmllm::MLLM: image_grid_thw and video_grid_thw {grids} do not fit the text's places")
        return order


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of a Qwen-VL."""
    variant = VARIANTS[raw["model_type"]]
    seen, inside = read_part(raw, "vision_config", origin), f"{origin} (vision_config)"
    vision = QwenVision(variant.vision(seen, inside))
    flat = {k: v for k, v in raw.items() if k not in ("vision_config", "model_type")}  # of older files
    text = read_part(raw, "text_config", origin, flat)
    language = decoder({**text, "model_type": variant.text}, f"{origin} (text_config)", tied=tied(raw, origin))
    if vision.width != language.config.width:
        raise ValueError(
            f"fastmllm::MLLM: {origin}: visual tokens are {vision.width} wide, but hidden_size of the text is "
            f"{language.config.width}"
        )
    image = read_size(raw, "image_token_id", 151655, origin, least=0)
    video = read_size(raw, "video_token_id", 151656, origin, least=0)
    rate = read_number(seen, "tokens_per_second", 4, inside) if variant.seconds else None
    aliases = [(new, old) for old, new in _TODAY.items() if old in (variant.visual, variant.body)]
    return Blueprint(
        images=NativePath(vision, image, video, rate, variant.frames_apart),
        language=language,
        layout=Layout(
            rules=[
                *prefixed(qwen_vision_rules(vision.config), "images.vision.", variant.visual),
                *decoder_rules(variant.body, variant.head),
            ],
            aliases=aliases,
            unused=decoder_unused(variant.body) if variant.body == "model." else {},
            tied=language.config.tie_embeddings,
        ),
        placeholders=(image, video),
    )
