"""The image half of a plan: tower, connector and a compressor between them, run on the meta device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastmllm.compression import Evidence, Placement, Probe, Tokens
from fastmllm.data.resolution import Plan
from fastmllm.models.families.mllama import MllamaPath
from fastmllm.models.image_path import ImagePath
from fastmllm.models.mllm import MLLM
from fastmllm.models.vision import VisionTransformer
from fastmllm.plan.encoded import blank_tiles
from fastmllm.plan.meter import COMPRESSOR, Meter, Phase
from fastmllm.plan.tokens import TokenCounts

META = torch.device("meta")


def encode_pictures(
    model: MLLM, plan: Plan, counts: TokenCounts, placement: Placement, pictures: int, meter: Meter, *, behind: bool
) -> Phase:  # fmt: skip
    """Run tower, compressor and connector.

    Args:
        model: on the meta device.
        plan: of every picture.
        counts: its tokens.
        placement: what compresses where.
        pictures: how many.
        meter: counts.
        behind: a compressor at the connector takes what comes out of it, not what goes in.

    Raises:
        ValueError: a compressor judges by what the tower does not have.
    """
    path, tiles = model.images, blank_tiles(plan)
    if placement.merge is not None:
        with meter.watching("vision"):
            x = _merged(path, tiles[0], placement, pictures)
        with meter.watching("connector"):
            path.connector(x)  # type: ignore[operator]
        return meter.phase()
    with meter.watching("vision"):
        seen = path.take([tiles] * pictures, [plan] * pictures)
        path(**seen.arguments)
    if placement.connector is None:
        return meter.phase()
    fewer = Meter(meter.rates, meter.owners)
    connector = getattr(path, "connector", getattr(path, "projector", None))
    block = 1 if behind else getattr(connector, "shuffle", 1)
    tokens, evidence = _evidence(model, plan, counts, pictures, block, behind=behind)
    with fewer.watching(COMPRESSOR):
        left, _ = placement.connector.to(META, torch.bfloat16)(tokens, evidence)
    if not behind and connector is not None:
        with fewer.watching("connector"):
            rows = left.x.new_empty(len(left.x) * block**2, left.x.shape[1] // block**2)  # in front of the shuffle
            connector(rows, [(block, len(left.x) * block)]) if block > 1 else connector(rows)
    # the connector's second count, of the tokens that are left, stands for its first
    return Phase(parts={**meter.parts, **fewer.parts}, peak=max(meter.peak, fewer.peak))


def _merged(path: ImagePath, tiles: Tensor, placement: Placement, pictures: int) -> Tensor:
    """Merge tokens inside of a ViT: (tiles, K, Dv) of all pictures."""
    vision = path.vision
    assert isinstance(vision, VisionTransformer)
    patch = vision.config.patch_size
    side = vision.config.image_size // patch * patch  # a part of a patch is unseen
    pixels = torch.cat([tiles[:, :side, :side]] * pictures)
    merged, _ = vision.encode(pixels, merge=placement.merge)
    return merged.x.unflatten(0, (len(pixels), -1))


def _evidence(
    model: MLLM, plan: Plan, counts: TokenCounts, pictures: int, block: int, *, behind: bool
) -> tuple[Tokens, Evidence]:
    """Make the tokens that a compressor takes, and what it may judge them by: of the right sizes, without numbers."""
    vision: Any = model.images.vision
    config = vision.config
    units = counts.units * pictures
    width = model.language.config.width if behind else config.width * block**2
    if isinstance(model.images, MllamaPath):
        width = config.out_width
    rows = _patches(plan) // len(counts.units)  # of the tower, of each unit
    each = rows // units[0]  # of a token
    lead = int(getattr(config, "cls_token", False))
    total, heads = len(units) * (rows + lead), config.num_heads
    x = torch.empty(sum(units), width, dtype=torch.bfloat16, device=META)
    q = torch.empty(total, heads, config.width // heads, dtype=torch.bfloat16, device=META)
    columns = (len(x), each) if each > 1 else (len(x),)
    probe = Probe(
        q=q, k=q, lse=torch.empty(heads, total, device=META), max_seqlen=rows + lead, cls_token=bool(lead),
        cu_seqlens=torch.empty(len(units) + 1, dtype=torch.int32, device=META),
        columns=torch.empty(columns, dtype=torch.int64, device=META),
    )  # fmt: skip
    given = torch.empty(len(x), device=META)
    return Tokens.of(x, [_grid(plan, n) for n in units]), Evidence(probe=probe, relevance=given, scores=given)


def _patches(plan: Plan) -> int:
    if plan.grid_thw is not None or plan.regrid is None:
        return plan.vit_tokens
    return plan.regrid.side**2 * len(plan.tiles)


def _grid(plan: Plan, tokens: int) -> tuple[int, int]:
    """Return rows and columns of a unit."""
    if plan.grid_thw is None:
        return math.isqrt(tokens), math.isqrt(tokens)
    _, down, across = plan.grid_thw
    merge = math.isqrt(down * across // tokens)
    return down // merge, across // merge
