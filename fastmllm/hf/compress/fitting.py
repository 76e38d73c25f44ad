"""Which compressors fit where a model makes visual tokens."""

from __future__ import annotations

from typing import Any

from fastmllm.compression import METHODS, Compressor
from fastmllm.hf.compress.seams import Seam

TEXT = "its text has one place a token, so positions are renumbered"
TILED = "its tower attends over all tiles of an image at once, of which some are padding"
ABOUT_TEXT = ("last_row", "text_rows")  # judged by the prompt


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
