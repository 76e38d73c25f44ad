"""Where the models of transformers make visual tokens, and where compression is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fastmllm.hf.fusion import ORIGINAL, STATE

KEY = STATE + "compression"  # where modules keep what is compressed
MADE = {"get_image_features", "get_video_features", "pack_image_features"}
OURS = {"forward", "generate"} | MADE  # what the parts of a model replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """Where one family's visual tokens are compressed.

    Args:
        prefix: of the names of its classes.
        connector: the name of the module between tower and language model; None: the tower itself projects.
        side: whether tokens are taken in front of the connector or behind it.
        tower: the name of the module whose attention may be read: a token of the connector is one row of it, or is made
            of r x r of them.
        text: the name of the language model.
        merges: tokens may merge inside of the tower: what comes behind it asks for no grid.
        grid: tokens are a grid, row by row.
        tiles: an image is several tiles, each of them compressed for itself.
        mrope: positions have three parts, time, row and column.
        videos: frames of a video are one grid, of which the text has a place for each token.
        crossed: images are read by cross-attention, so that the text has no places for them.
    """

    prefix: str
    connector: str | None = "multi_modal_projector"
    side: Literal["in front of", "behind"] = "in front of"
    tower: str | None = None
    text: str = "language_model"
    merges: bool = False
    grid: bool = True
    tiles: bool = False
    mrope: bool = False
    videos: bool = False
    crossed: bool = False

    @property
    def place(self) -> str:
        if self.crossed:
            return "behind vision_model, for cross-attention"
        return "behind its merger" if self.connector is None else f"{self.side} {self.connector}"


# package under transformers.models
SEAMS: Mapping[str, Seam] = {
    "llava": Seam(prefix="Llava", tower="vision_tower", merges=True),
    "llava_next": Seam(prefix="LlavaNext", tower="vision_tower", merges=True, tiles=True),
    "llava_onevision": Seam(prefix="LlavaOnevision", tower="vision_tower", merges=True, tiles=True, videos=True),
    "internvl": Seam(prefix="InternVL", tower="vision_tower"),
    "paligemma": Seam(prefix="PaliGemma", tower="vision_tower", merges=True),
    "gemma3": Seam(prefix="Gemma3", side="behind", tower="vision_tower"),
    "idefics2": Seam(prefix="Idefics2", text="text_model", connector="connector", side="behind", grid=False),
    "idefics3": Seam(prefix="Idefics3", text="text_model", connector="connector", side="behind", tower="vision_model"),
    "smolvlm": Seam(prefix="SmolVLM", text="text_model", connector="connector", side="behind", tower="vision_model"),
    "qwen2_vl": Seam(prefix="Qwen2VL", connector=None, tower="visual", mrope=True, videos=True),
    "qwen2_5_vl": Seam(prefix="Qwen2_5_VL", connector=None, tower="visual", mrope=True, videos=True),
    "qwen3_vl": Seam(prefix="Qwen3VL", connector=None, tower="visual", mrope=True),
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
    around: dict[str, str] = {}
    for name, module in model.named_modules():
        package, cls = family_of(module)
        if package is None:
            continue
        seam = SEAMS.get(package)
        if seam and cls.__name__ in (f"{seam.prefix}ForConditionalGeneration", f"{seam.prefix}Model"):
            outside = [kind for prefix, kind in around.items() if name.startswith(prefix)]
            if outside:
                raise ValueError(f"patch: cannot compress {seam.prefix}: {outside[0]} around it reads the whole text")
            return name, module, seam
        around[f"{name}.".lstrip(".")] = cls.__name__
    raise ValueError(
        f"patch: cannot compress the visual tokens of {type(model).__name__}: known families: {', '.join(SEAMS)}, "
        "mllama, idefics, blip_2, instructblip"
    )
