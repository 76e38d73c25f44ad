"""Where the models of transformers make visual tokens, and which compressors fit there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fastmllm.compression import METHODS, Compressor, Placement
from fastmllm.compression.published import PUBLISHED, placement
from fastmllm.hf.fusion import ORIGINAL

TEXT = "its text has one place a token, so positions are renumbered"
INSERTED = "its images stand in the text as cross-attention, not as tokens: there is nothing to shorten in front of it"
QUERIES = "its connector makes 32 queries of an image already, a learned number that its language model was trained on"
WITHOUT_PLACES = {"mllama": INSERTED, "idefics": INSERTED, "blip_2": QUERIES, "instructblip": QUERIES}
OURS = {"forward", "generate", "get_image_features", "pack_image_features"}  # what the parts of a model replace
ABOUT_TEXT = ("given", "external", "last_row", "text_rows")  # judged by the prompt, or by whoever calls


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """Where one family's visual tokens are compressed.

    Args:
        prefix: of the names of its classes.
        connector: the name of the module between tower and language model; None: the tower itself projects.
        side: whether tokens are taken in front of the connector or behind it.
        tower: the name of the module whose attention may be read, where a token of the connector is one of its own.
        grid: tokens are a grid, row by row.
        tiles: an image is several tiles, each of them compressed for itself.
        mrope: positions have three parts, time, row and column.
    """

    prefix: str
    connector: str | None = "multi_modal_projector"
    side: Literal["in front of", "behind"] = "in front of"
    tower: str | None = None
    grid: bool = True
    tiles: bool = False
    mrope: bool = False

    @property
    def place(self) -> str:
        return "behind its merger" if self.connector is None else f"{self.side} {self.connector}"


# package under transformers.models
SEAMS: Mapping[str, Seam] = {
    "llava": Seam(prefix="Llava", tower="vision_tower"),
    "llava_next": Seam(prefix="LlavaNext", tower="vision_tower", tiles=True),
    "llava_onevision": Seam(prefix="LlavaOnevision", tower="vision_tower", tiles=True),
    "internvl": Seam(prefix="InternVL"),
    "paligemma": Seam(prefix="PaliGemma", tower="vision_tower"),
    "gemma3": Seam(prefix="Gemma3", side="behind"),
    "idefics2": Seam(prefix="Idefics2", connector="connector", side="behind", grid=False),
    "idefics3": Seam(prefix="Idefics3", connector="connector", side="behind"),
    "smolvlm": Seam(prefix="SmolVLM", connector="connector", side="behind"),
    "qwen2_vl": Seam(prefix="Qwen2VL", connector=None, mrope=True),
    "qwen2_5_vl": Seam(prefix="Qwen2_5_VL", connector=None, mrope=True),
    "qwen3_vl": Seam(prefix="Qwen3VL", connector=None, mrope=True),
}


def family_of(module: nn.Module) -> tuple[str | None, type]:
    """Return the package under transformers.models that a module's class is of, or the class that it derives from.

    Raises:
        ValueError: it derives from a model whose text or images it computes in its own way.
    """
    cls = getattr(type(module), ORIGINAL, type(module))
    for place, base in enumerate(cls.__mro__):
        family = re.fullmatch(r"transformers\.models\.(\w+)\.modeling_\w+", base.__module__)
        if family is None:
            continue
        own = sorted({n for c in cls.__mro__[:place] for n in vars(c)} & OURS)
        if own and family[1] in SEAMS:
            raise ValueError(f"patch: cannot compress {cls.__name__}: it has a {', '.join(own)} of its own")
        return family[1], base
    return None, cls


def find(model: nn.Module) -> tuple[str, Any, Seam]:
    """Return the outermost module that takes images as tokens: its name in the model, the module and its seam.

    Raises:
        ValueError: there is none.
    """
    packages: list[str] = []
    around: dict[str, str] = {}
    for name, module in model.named_modules():
        package, cls = family_of(module)
        if package is None:
            continue
        packages.append(package)
        seam = SEAMS.get(package)
        if seam and cls.__name__ in (f"{seam.prefix}ForConditionalGeneration", f"{seam.prefix}Model"):
            outside = [kind for prefix, kind in around.items() if name.startswith(prefix)]
            if outside:
                raise ValueError(f"patch: cannot compress {seam.prefix}: {outside[0]} around it reads the whole text")
            return name, module, seam
        around[f"{name}.".lstrip(".")] = cls.__name__
    why = next((WITHOUT_PLACES[p] for p in packages if p in WITHOUT_PLACES), f"known families: {', '.join(SEAMS)}")
    raise ValueError(f"patch: cannot compress the visual tokens of {type(model).__name__}: {why}")


def placement_of(compress: Placement | Compressor | str, seam: Seam) -> Placement:
    """Return what is to run at the connector, and between layers of the language model.

    Args:
        compress: as `patch` takes it; "VisionZip" or "visionzip:64" name a published method, with its own budget or K.
        seam: where it is to run: it settles the positions of a method that is named.

    Raises:
        ValueError: an unknown name, a place inside of the encoder, or weights that nobody could train.
    """
    if isinstance(compress, str):
        compress = _named(compress, seam)
    if isinstance(compress, Compressor):
        return Placement(connector=compress)
    if not isinstance(compress, Placement):
        raise ValueError(f"patch: compress must be a Placement, a Compressor or a published name, got {compress!r}")
    if compress.merge is not None:
        raise ValueError(
            f"patch: compress={compress}: inside of the encoder tokens are merged in fastmllm's own models (VLM, MLLM)"
        )
    if not compress.compressors:
        raise ValueError("patch: compress=Placement() compresses nowhere: give its connector a compressor, or None")
    return compress


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
    if compressor.position == "keep" and not seam.mrope:
        refuse(f"{TEXT}: position='renumber'")
    if compressor.name in ("pixel_shuffle", "temporal_dedup"):
        wide = "its tokens become wider, and the connector's weights are for the width that they have"
        refuse(wide if compressor.name == "pixel_shuffle" else "it wants the frames of videos, and these are images")
    for option in ("relevance", "scorer"):
        if getattr(compressor, option, None) in ABOUT_TEXT and type(compressor) in METHODS.values():
            refuse(f"{option}={getattr(compressor, option)!r} judges by what the connector does not see")
    if compressor.layer is not None and seam.tower is None:
        refuse(f"it judges by attention, and a token {seam.place} is none that the tower's attention sees")
    if not seam.mrope and not isinstance(compressor.keep, int | float):
        refuse("its images, or their tiles, are of one size: one number or fraction for all of them")
    if getattr(model.config.vision_config, "model_type", None) == "pixtral":
        refuse("its tower packs images of several sizes into one row")
