"""What a call says about its text, by which layers drop of it: where its images are, and where its questions end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmllm.compression.reduction import IGNORED
from fastmllm.compression.tokens import Grid
from fastmllm.hf.compress.cached import Held, held
from fastmllm.hf.compress.features import again, encode, repeated
from fastmllm.hf.compress.fitting import asks
from fastmllm.hf.compress.media import IMAGE
from fastmllm.hf.compress.passes import Pass
from fastmllm.hf.compress.rows import Images, Rows
from fastmllm.hf.compress.state import Compression
from fastmllm.hf.compress.text import LABELS, ends, follow, padding, refuse_beside


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a call says about its text.

    Args:
        ids: (B, T) of the text that is new.
        token: the id of a placeholder.
        seqlens: placeholders of each image.
        grid: of each image, if it is one.
        mask: (B, P + T) on the host, 0 where the text is padded, or None.
        labels: (B, T) on the host, already shifted, or None.
        asked: columns up to where the question ends, where an answer follows it already; None: all of them.
        left: rows of different lengths are padded in front.
    """

    ids: Tensor
    token: int
    seqlens: tuple[int, ...]
    grid: tuple[Grid, ...] | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None
    asked: int | None = None
    left: bool = False

    def answers(self, valid: Tensor) -> Tensor | None:
        """Return labels (T',) of the tokens that a mask (B, T) names, that say which rows are answers, or None."""
        labels = self.labels
        if labels is None and self.asked is not None and self.asked < valid.shape[1]:
            labels = torch.zeros(valid.shape, dtype=torch.int64)
            labels[:, : self.asked - 1] = IGNORED
        return None if labels is None else labels[valid]


def image_lengths(features: Any, places: Tensor) -> tuple[int, ...]:
    """Return the placeholders of each image, as they were encoded; where that does not say, of each run of them."""
    runs = [len(list(run)) for row in places.tolist() for there, run in groupby(row) if there]
    x = features.pooler_output
    entries = list(x) if not isinstance(x, Tensor) or x.dim() == 3 else []
    lengths = [n for e in entries for n in ([e.shape[1]] * len(e) if e.dim() == 3 else [len(e)])]
    ends = set(torch.tensor(lengths).cumsum(0).tolist())
    if set(torch.tensor(runs).cumsum(0).tolist()) <= ends and sum(lengths) == sum(runs):
        return tuple(lengths)
    return tuple(runs)


def images_of_rows(seqlens: Sequence[int], places: Tensor) -> list[int]:
    """Return how many images each row has."""
    ends = torch.tensor(seqlens).cumsum(0)
    return torch.bincount(torch.bucketize(ends, places.sum(1).cumsum(0)), minlength=len(places)).tolist()


def plan(state: Compression, call: dict[str, Any]) -> Rows | None:
    """Encode a call's images, plan what layers drop of them, and shorten its labels.

    Returns:
        What is left of the text behind the last layer; None: all of it.
    """
    ids = call.get("input_ids")
    text = call.get("inputs_embeds") if ids is None else ids
    if text is None:
        return None
    (batch, columns), device = text.shape[:2], text.device
    turned = any(c.layer is not None and not asks(c) for _, c in state.stages)  # norms of turned keys (DART)
    if turned and not state.seam.mrope and call.get("position_ids") is None:
        call["position_ids"] = _counted(call, columns, device, first=int(state.seam.prefix == "PaliGemma"))
    have = held(call.get("past_key_values"), batch, [layer for layer, _ in state.stages])
    features = (call.get("mm_encoder_outputs") or {}).get("image")  # as `generate` encodes them itself
    if features is None and call.get(IMAGE.pixels) is not None:
        encode(state, call)
        features = again(state.now.held[IMAGE], call[IMAGE.pixels])
    prompt = None if ids is None or features is None else _prompt(state, call, have, features)
    flash = "flash" in (state.text.config._attn_implementation or "")
    way = Pass(state.stages, have, (batch, columns), device, prompt, flash)
    if not way.loses:
        return None
    state.now.way, rows = way, way.rows[-1]
    if prompt is not None and rows is not None and way.reduction is not None:
        refuse_beside(call, Images(prompt.seqlens, way.reduction.budgets[state.stages[-1][0]]))
        if flash and batch == 1 and _packed(call):
            raise ValueError("compress: texts packed into one row keep their boundaries beside the text in flash")
        follow(call, rows, LABELS)
    return rows


@torch.compiler.disable
def _counted(call: dict[str, Any], columns: int, device: torch.device, first: int) -> Tensor | None:
    """Return (B, T) positions as `generate` counts them, from `first`, where rows are padded in front, or None."""
    mask = padding(call)
    if mask is None or not bool((mask[:, 0] == 0).any()):
        return None
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -columns:].to(device) + first


@torch.compiler.disable
def _prompt(state: Compression, call: dict[str, Any], have: Held, features: Any) -> Prompt:
    ids, labels, mask = call["input_ids"], call.get("shift_labels"), padding(call)
    if labels is None and call.get("labels") is not None:
        labels = pad(call["labels"], (0, 1), value=IGNORED)[:, 1:]
    _, left = ends(mask, ids.shape[1], labels is None and not state.owner.training)
    token = state.owner.config.image_token_id
    places = ids.cpu() == token
    seqlens = image_lengths(features, places)
    return Prompt(
        ids=ids, token=token, seqlens=seqlens, grid=_grid(state, call, seqlens, places), mask=mask,
        labels=None if labels is None else labels.cpu(), left=left,
        asked=state.now.prompt - have.columns if state.now.prompt else None,
    )  # fmt: skip


def _grid(
    state: Compression, call: dict[str, Any], seqlens: Sequence[int], places: Tensor
) -> tuple[tuple[int, int, int], ...] | None:
    """Return the grid of each image, row by row, if they are some."""
    if state.seam.mrope:
        side, grids = state.owner.visual.spatial_merge_size, call.get("image_grid_thw")
        if grids is None and (grids := state.now.grids) is not None:
            grids = grids[repeated(images_of_rows(seqlens, places)[:: (n := len(seqlens) // len(grids))], n)]
        grid = tuple((t, h // side, w // side) for t, h, w in (() if grids is None else grids.tolist()))
    else:
        grid = tuple((1, math.isqrt(n), math.isqrt(n)) for n in seqlens)
    known = state.seam.grid and not state.seam.tiles and tuple(map(math.prod, grid)) == tuple(seqlens)
    return grid if known else None


def _packed(call: dict[str, Any]) -> bool:
    positions = call.get("position_ids")
    return positions is not None and bool((positions[..., 1:] < positions[..., :-1]).any())
