"""Tiny models that take videos, and rows of images, videos and both."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny_hf import BOS, draw
from tiny_hf_compress import KINDS, START, patches

GRIDS = ([3, 6, 6], [2, 4, 8])
CLIPS = tuple((draw(t * h * w, 96, seed=9 + s).double(), [t, h, w]) for s, (t, h, w) in enumerate(GRIDS))
# rows of text, images 0..2 and videos 3 and 4: both kinds, in both orders; a video and an image side by side; none
MIXED = (
    ([BOS, 20, START], 3, [22, 23, START], 1, [25, 26, 27, 28]),
    ([BOS, 40, 41, 42, 43],),
    ([BOS, START], 2, [9, START], 4, [30, 31, 32, 33, 34]),
)


def _slow(build):
    """Return the same with a time that goes on by one a frame."""

    def built():
        model = build()
        model.config.vision_config.tokens_per_second = 1
        return model

    return built


def of_patches(images, which):
    return {name.replace("image", "video") if "grid" in name else f"{name}_videos": value
            for name, value in patches(images, which).items()}  # fmt: skip


def of_frames(images, which):
    return {"pixel_values_videos": torch.stack([images[i] for row in which for i in row])}


VIDEO_KINDS = [
    replace(
        kind, build=_slow(kind.build), images=(*kind.images, *CLIPS), places=(*kind.places, 27, 16), tiles=(1,) * 5,
        clips=(3, 4), filmed=of_patches,
    )
    for kind in KINDS if kind.name in ("qwen2_vl", "qwen2_5_vl")
] + [
    replace(
        kind, images=(*kind.images, *(draw(3, 3, 28, 28, seed=s).double() for s in (9, 10))),
        places=(*kind.places, 13, 13), tiles=(*kind.tiles, 1, 1), clips=(3, 4), filmed=of_frames,
    )
    for kind in KINDS if kind.name == "llava_onevision"
]  # fmt: skip
