"""What a resolution policy and a compressor make of an image, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from fastmllm.compression import BipartiteMerge, Placement
from fastmllm.compression.budget import tokens_to_keep
from fastmllm.data.resolution import Plan
from fastmllm.hf.compress import check, placement_of
from fastmllm.plan.stacks import Stack


@dataclass(frozen=True, kw_only=True, slots=True)
class Waste:
    """Shares of the encoder's pixels.

    Args:
        padding: show nothing.
        enlarged: repeat what the image has.
        overview: show smaller what the detailed tiles show.
    """

    padding: float
    enlarged: float
    overview: float

    @property
    def total(self) -> float:
        return self.padding + self.enlarged + self.overview


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCounts:
    """Tokens of one image.

    Args:
        vit: patches (and class tokens, where the policy counts them) that the encoders compute.
        llm: visual tokens of the text without compression.
        cross: visual tokens that layers look at instead, or beside them.
        units: tokens of each grid that is compressed for itself, an image or a tile, in front of the compressor.
        left: the same behind it.
        llm_left, cross_left: of the text and beside it, with compression at the connector or inside of the tower.
        stages: (layer, visual tokens of the text from this layer on), with compression between layers.
    """

    vit: int
    llm: int
    cross: int
    units: tuple[int, ...]
    left: tuple[int, ...]
    llm_left: int
    cross_left: int
    stages: tuple[tuple[int, int], ...] = ()


def waste_of(plan: Plan) -> Waste:
    """Say where a plan's pixels go that show nothing more of the image."""
    whole = plan.encoder_pixels
    padding = plan.detail_pixels - plan.shown_pixels
    overview = whole - plan.detail_pixels
    total = max(whole - plan.effective_pixels, 0)
    enlarged = max(total - padding - overview, 0)
    return Waste(padding=padding / whole, enlarged=enlarged / whole, overview=(total - padding - enlarged) / whole)


def units_of(plan: Plan, stack: Stack) -> tuple[int, ...]:
    """Return the tokens of each grid that `patch(compress=)` compresses for itself: images, or tiles.

    A class token that layers look at is none of them.
    """
    if plan.regrid is not None:
        return (plan.regrid.side**2,) * len(plan.tiles)
    count = 1 if plan.grid_thw is not None else sum(tile.encoder == 0 for tile in plan.tiles)
    tokens = plan.llm_tokens or plan.cross_tokens
    if stack.seam is not None and stack.seam.crossed:
        tokens -= count
    return (tokens // count,) * count


def count_tokens(plan: Plan, stack: Stack, placement: Placement) -> TokenCounts:
    """Count the tokens of an image.

    Args:
        plan: of the image, by the stack's policy.
        stack: says what is compressed for itself.
        placement: what compresses where.

    Raises:
        ValueError: a budget that does not fit.
    """
    units = units_of(plan, stack)
    left, llm, cross = units, plan.llm_tokens, plan.cross_tokens
    compressor = placement.connector
    if placement.merge is not None:
        compressor = BipartiteMerge(placement.merge, position="renumber")
    if compressor is not None:
        left = tokens_to_keep(compressor.name, compressor.keep, units)
        if left != units and stack.seam is not None and stack.seam.crossed:
            cross = sum(left) + len(left)  # each tile's class token stays
        elif left != units:
            llm = sum(left)  # what is left of tiles is no grid: no ends of lines
    rows = _rows(plan, left, llm)
    stages = tuple((layer, sum(tokens_to_keep(c.name, c.keep, rows))) for layer, c in placement.stages)
    return TokenCounts(
        vit=plan.vit_tokens, llm=plan.llm_tokens, cross=plan.cross_tokens, units=units, left=left, llm_left=llm,
        cross_left=cross, stages=stages,
    )  # fmt: skip


def _rows(plan: Plan, left: Sequence[int], llm: int) -> tuple[int, ...]:
    """Return the visual tokens in the text that stages take for themselves: those of LLaVA's tiles together."""
    return (llm,) if plan.regrid is not None or not llm or sum(left) != llm else tuple(left)


def rows_of(plan: Plan, counts: TokenCounts) -> tuple[int, ...]:
    """Return the runs of visual tokens that stand in the text, as stages between layers take them."""
    return _rows(plan, counts.left, counts.llm_left)


def find_placement(compress: str | None, stack: Stack, name: str) -> Placement:
    """Return what `patch(compress=)` would run in a stack.

    Args:
        compress: such as "visionzip:64"; None: nothing.
        stack: where.
        name: of the stack, for messages.

    Raises:
        ValueError: an unknown method, or one that has no place in this stack, with the reason.
    """
    if compress is None or compress.lower() == "none":
        return Placement()
    if stack.seam is None:
        raise ValueError(f"plan: {name}: no compressor has a place there: its connector reads all tokens of its tower")
    placement = placement_of(compress, stack.seam)
    if placement.connector is not None:
        # the rest of a model is asked for one thing: whether its tower is Pixtral's, which no stack has
        check(placement.connector, stack.seam, SimpleNamespace(config=SimpleNamespace(vision_config=None)))
    return placement
