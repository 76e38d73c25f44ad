"""What `patch` is asked to compress with, and whether it fits where a model has visual tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from fastmllm.compression import METHODS, BipartiteMerge, Compressor, PivotDedup, Placement
from fastmllm.compression.budget import check_budget
from fastmllm.compression.published import PUBLISHED, placement
from fastmllm.hf.compress.seams import Seam

GRID = "what comes behind it makes one of r x r patches, or reads where each stood: merged tokens are no grid"
TEXT = "its text has one place a token, so positions are renumbered"
TILED = "its tower attends over all tiles of an image at once, of which some are padding"
PREFIX = "its prompt sees all of itself, and scores are those of causal attention"
CLASS_TOKENS = ("class_embedding", "cls_token")
ABOUT_TEXT = ("last_row", "text_rows")  # judged by the prompt


def placement_of(compress: Placement | Compressor | str, seam: Seam) -> Placement:
    """Return what is to run inside of the tower or at the connector, and between layers of the language model.

    Args:
        compress: as `patch` takes it; "VisionZip" or "visionzip:64" name a published method, with its own budget or K.
        seam: where it is to run: it settles the positions of a method that is named.

    Raises:
        ValueError: an unknown name, a place inside of the encoder, or weights that nobody could train.
    """
    if isinstance(compress, str):
        compress = _named(compress, seam)
    if isinstance(compress, Compressor):
        compress = Placement(connector=compress)
    if not isinstance(compress, Placement):
        raise ValueError(f"patch: compress must be a Placement, a Compressor or a published name, got {compress!r}")
    if compress.stages and seam.crossed:
        raise ValueError(f"patch: cannot compress inside of the language model of {seam.prefix}: it has no image rows")
    if compress.merge is not None:
        if not seam.merges:
            why = "we know no layers of its tower" if seam.crossed else GRID
            raise ValueError(f"patch: cannot merge tokens inside of the encoder of {seam.prefix}: {why}")
        if compress.connector is not None:
            raise ValueError("patch: compress both inside of the encoder and at the connector: choose one of them")
    if compress.merge is None and not compress.compressors:
        raise ValueError("patch: compress=Placement() compresses nowhere: give its connector a compressor, or None")
    _check_budgets(compress)
    return compress


def _check_budgets(asked: Placement) -> None:
    """Refuse what no image can be left with, whatever its size."""
    for compressor in asked.compressors:
        if not isinstance(compressor, Compressor):
            raise ValueError(f"patch: a Placement takes compressors, got {compressor!r}: make(method, keep, ...) one")
    budgets = [] if asked.merge is None else [(BipartiteMerge.name, asked.merge)]
    try:
        for name, keep in (*budgets, *((compressor.name, compressor.keep) for compressor in asked.compressors)):
            check_budget(name, keep)
    except ValueError as error:
        raise ValueError(f"patch: compress: {error}") from None
    for (first, before), (layer, compressor) in pairwise(asked.stages):
        if layer <= first:
            raise ValueError(f"patch: stages in front of layers {first} and {layer}: one a layer, the first one first")
        keep, left = compressor.keep, before.keep
        if type(keep) is type(left) and isinstance(keep, int | float) and keep > left:  # type: ignore[operator]
            raise ValueError(
                f"patch: in front of layer {layer} {keep} tokens are to be left of {left} in front of layer {first}: "
                "budgets count what came in first, and cannot grow"
            )


def _named(text: str, seam: Seam) -> Placement:
    name, _, budget = text.partition(":")
    known = {published.lower(): published for published in PUBLISHED}
    if name.lower() not in known:
        raise ValueError(f"patch: compress={text!r}: unknown method; known: {', '.join(PUBLISHED)}")
    line = PUBLISHED[known[name.lower()]]
    try:
        keeps = [float(k) if "." in k else int(k) for k in budget.split("/") if budget]
    except ValueError:
        raise ValueError(f"patch: compress={text!r}: {budget!r} is neither a number of tokens nor a fraction") from None
    position = {"position": "keep"} if seam.mrope and line["at"] == "connector" else {}
    keep = keeps if len(keeps) > 1 else keeps[0] if keeps else None  # one a layer
    made = placement(known[name.lower()], keep, **position)
    if any(True for compressor in made.compressors for _ in compressor.parameters()):
        raise ValueError(
            f"patch: compress={text!r}: {line['method']} has weights of its own: build it, load or train them, and "
            "give the compressor"
        )
    return made


def check(compressor: Compressor, seam: Seam, model: Any) -> None:
    """Refuse a compressor that has no place in this model.

    Raises:
        ValueError: says why.
    """

    def refuse(why: str) -> None:
        raise ValueError(f"patch: cannot compress {seam.prefix} with {compressor.name}: {why}")

    if compressor.position == "calibrate":
        refuse("position='calibrate' needs a bias on attention that its language model does not take")
    if compressor.position == "keep" and not (seam.mrope or seam.crossed):
        refuse(f"{TEXT}: position='renumber'")
    if compressor.name == "pixel_shuffle":
        refuse("its tokens become wider, and the connector's weights are for the width that they have")
    if compressor.name == "temporal_dedup" and not seam.videos:
        refuse("it wants the frames of videos, and these are images")
    for option in ("relevance", "scorer"):
        if getattr(compressor, option, None) in ABOUT_TEXT and type(compressor) in METHODS.values():
            refuse(f"{option}={getattr(compressor, option)!r} judges by what the connector does not see")
    if compressor.layer is not None and seam.tower is None:
        latents = f"{seam.place} stand latents: what the tower's patches receive is not theirs"
        refuse(f"it judges by attention, and {TILED if seam.crossed else latents}")
    if not seam.mrope and not isinstance(compressor.keep, int | float):
        refuse("its images, or their tiles, are of one size: one number or fraction for all of them")
    if getattr(model.config.vision_config, "model_type", None) == "pixtral":
        refuse("its tower packs images of several sizes into one row")


def check_stage(layer: int, compressor: Compressor, seam: Seam, depth: int) -> None:
    """Refuse a stage that has no place in this model.

    Raises:
        ValueError: says why.
    """

    def refuse(why: str) -> None:
        raise ValueError(
            f"patch: cannot compress {seam.prefix} with {compressor.name} in front of layer {layer}: {why}"
        )

    if not 0 < layer < depth:
        behind = "in front of the first one stands the connector: Placement(connector=…)"
        refuse(behind if not layer else f"its language model has {depth}")
    if compressor.position == "renumber":
        refuse("earlier layers keep their positions: position='keep' or 'calibrate'")
    if compressor.name == "temporal_dedup":
        refuse("it wants the frames of videos, and these are images")
    options = {getattr(compressor, name, None) for name in ("scorer", "relevance")}
    if options & {"given", "external"}:
        refuse("nobody gives it scores there")
    if "cls_row" in options and asks(compressor):
        refuse("a language model has no class token: scorer 'last_row', 'text_rows' or 'received'")
    if seam.prefix == "PaliGemma" and asks(compressor):
        refuse(PREFIX)


def asks(compressor: Compressor) -> bool:
    """Tell whether a compressor judges by attention, not by keys alone (DART)."""
    by_keys = isinstance(compressor, PivotDedup) and compressor.pivots == "norm"
    return compressor.layer is not None and not by_keys


def has_class_token(tower: nn.Module) -> bool:
    """Tell whether a tower puts a token of its own in front of the patches."""
    return any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in tower.named_parameters())


def reads_first_row(compressor: Any) -> bool:
    """Tell whether a compressor reads the class token's attention."""
    if getattr(compressor, "relevance", None) == "cls_row":
        return True
    return getattr(compressor, "scorer", None) == "cls_row" and getattr(compressor, "pivots", "score") == "score"
