"""Compress what comes out of a model that is asked for features: Qwen's mergers, and LLaVA-OneVision's videos."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastmllm.compression import Tokens
from fastmllm.hf.compress.rows import Images
from fastmllm.hf.compress.state import Compression


def merged(state: Compression, module: Any, out: Any, grid_thw: Tensor) -> Any:
    """Compress what a tower that projects by itself gives: a list of images, and of DeepStack's layers too."""
    side = module.visual.spatial_merge_size
    deep: Any = getattr(out, "deepstack_features", None) or ()
    split = bool(deep) and not isinstance(deep[0], Tensor)  # a list of images, or in transformers < 5.23 one tensor
    layers = [torch.cat(tuple(features)) if split else features for features in deep]
    grids = [(t, h // side, w // side) for t, h, w in grid_thw.tolist()]
    tokens = Tokens.of(torch.cat(tuple(out.pooler_output)), grids, planes=layers)
    kept = state.reduce(tokens)
    if kept is not tokens:
        each = list(kept.seqlens)
        out.pooler_output = kept.x.split(each)
        if layers:
            out.deepstack_features = [plane.split(each) if split else plane for plane in kept.planes]
    return out


def takes_videos(state: Compression) -> None:
    """Refuse videos for a compressor that is for what images are there.

    Raises:
        ValueError: says why.
    """

    def refuse(why: str) -> None:
        raise ValueError(f"compress: videos of {state.seam.prefix} with {state.compressor.name}: {why}")

    if state.seam.connector is None:
        return
    if state.inside:
        refuse("its frames are pooled as grids, and merged tokens are none")
    if state.compressor.layer is not None:
        refuse("it judges by the tower's attention, and tokens of a frame are pooled from parts of patches")
    if any(True for _ in state.compressor.parameters()):
        refuse("its weights are for tokens in front of the projector, and those of a video stand behind it")


def filmed(state: Compression, out: Any, frames: int) -> Any:
    """Compress (V, T h w, D) pooled frames; the line's end behind each video, here or put there later, stays."""
    x: Tensor = out.pooler_output
    vision = state.owner.config.vision_config
    side = math.ceil(vision.image_size // vision.patch_size / 2)
    tokens = frames * side**2
    kept = state.reduce(Tokens.of(x[:, :tokens].flatten(0, 1), [(frames, side, side)] * len(x)))
    now = state.now
    assert now.images is not None
    before, after = (tuple(n + 1 for n in side) for side in (now.images.before, now.images.after))
    now.images = Images(before, after)
    if now.images.before != now.images.after:
        out.pooler_output = torch.cat([kept.dense(), x[:, tokens:]], 1)
    return out
