"""Images and videos: which arguments bring them, how a model encodes them, and in which order they stand in a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastmllm.hf.compress.rows import Images, places_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Medium:
    """One kind of what is seen.

    Args:
        pixels: the argument that brings it.
        grids: the argument that says its frames, rows and columns of patches, in Qwen's models.
        token: what the config calls the id of its placeholder.
        method: what encodes it.
    """

    pixels: str
    grids: str
    token: str
    method: str


IMAGE = Medium(pixels="pixel_values", grids="image_grid_thw", token="image_token_id", method="get_image_features")
VIDEO = Medium(
    pixels="pixel_values_videos", grids="video_grid_thw", token="video_token_id", method="get_video_features"
)  # fmt: skip


def in_order(ids: Tensor, config: Any, found: Mapping[Medium, Images]) -> tuple[Tensor, int, Images, list[Medium]]:
    """Return a text whose placeholders are all alike, their id, images and videos as they stand in it, and their kinds.

    Args:
        ids: (B, T) of the text.
        config: of the model.
        found: images and videos, each in the order of its own placeholders.

    Raises:
        ValueError: placeholders do not fit.
    """
    if len(found) < 2:
        medium, images = next(iter(found.items()), (IMAGE, Images((), ())))
        return ids, getattr(config, medium.token), images, [medium] * len(images.before)
    host, starts, token = ids.cpu(), [], config.image_token_id
    for medium, images in found.items():
        ends = torch.tensor(images.before, dtype=torch.int64).cumsum(0)
        first = ends - torch.tensor(images.before, dtype=torch.int64)
        starts += places_of(host, getattr(config, medium.token), images)[first].tolist()
        ids = ids.masked_fill(ids == getattr(config, medium.token), token)
    order = sorted(range(len(starts)), key=starts.__getitem__)
    before, after = (list(chain(*(getattr(i, side) for i in found.values()))) for side in ("before", "after"))
    pos = None
    if any(images.pos is not None for images in found.values()):
        standing = [part for images in found.values() for part in _standing(images, ids.device)]
        pos = torch.cat([standing[i] for i in order])
    kinds = [medium for medium, images in found.items() for _ in images.before]
    runs = Images(tuple(before[i] for i in order), tuple(after[i] for i in order), pos)
    return ids, token, runs, [kinds[i] for i in order]


def _standing(images: Images, device: torch.device) -> tuple[Tensor, ...]:
    """Return which placeholder of its image or video each token stands at."""
    if images.pos is None:  # nothing was lost
        return tuple(torch.arange(n, device=device) for n in images.before)
    return images.pos.to(device).split(list(images.after))
