"""Which modules compute with what: a file a family of transformers, by its package and class names.

What is right wherever it stands (norms, patch convolutions) goes by structure instead, also in families without a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from fastmllm.hf.fusion import ORIGINAL, Fusion
from fastmllm.hf.rules import (
    blip_2,
    idefics,
    idefics2,
    idefics3,
    instructblip,
    llava,
    mllama,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    smolvlm,
)
from fastmllm.hf.rules.structure import by_structure

Rules = Mapping[str, tuple[type[Fusion], ...]]

# package under transformers.models -> class name -> what it computes with
FAMILIES: Mapping[str, Rules] = {
    "blip_2": blip_2.RULES,
    "idefics": idefics.RULES,
    "idefics2": idefics2.RULES,
    "idefics3": idefics3.RULES,
    "instructblip": instructblip.RULES,
    "llava": llava.RULES,
    "mllama": mllama.RULES,
    "qwen2_5_vl": qwen2_5_vl.RULES,
    "qwen2_vl": qwen2_vl.RULES,
    "qwen3_vl": qwen3_vl.RULES,
    "smolvlm": smolvlm.RULES,
}
OPS = frozenset({"patch_embed", "layer_norm", "rms_norm"}) | {
    fusion.op for rules in FAMILIES.values() for fusions in rules.values() for fusion in fusions
}


def fusions_of(module: nn.Module) -> tuple[type[Fusion], ...]:
    """Return what a module may compute with, by its class's place in transformers and by its structure.

    A method that this version of transformers does not have is not replaced.
    """
    cls = getattr(type(module), ORIGINAL, type(module))
    family = re.fullmatch(r"transformers\.models\.(\w+)\.\w+", cls.__module__)
    rules = FAMILIES.get(family[1], {}) if family else {}
    named = (f for f in rules.get(cls.__name__, ()) if all(hasattr(cls, name) for name in f.overrides))
    return (*named, *by_structure(module))
