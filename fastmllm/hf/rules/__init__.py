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
    clip,
    decoders,
    dinov2,
    dinov2_with_registers,
    gemma3,
    idefics,
    idefics2,
    idefics3,
    instructblip,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    mllama,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    siglip,
    siglip2,
    smolvlm,
    vipllava,
)
from fastmllm.hf.rules.structure import by_structure

Rules = Mapping[str, tuple[type[Fusion], ...]]

# package under transformers.models -> class name -> what it computes with
FAMILIES: Mapping[str, Rules] = {
    **decoders.PACKAGES,
    "blip_2": blip_2.RULES,
    "clip": clip.RULES,
    "dinov2": dinov2.RULES,
    "dinov2_with_registers": dinov2_with_registers.RULES,
    "gemma3": gemma3.RULES,
    "idefics": idefics.RULES,
    "idefics2": idefics2.RULES,
    "idefics3": idefics3.RULES,
    "instructblip": instructblip.RULES,
    "internvl": internvl.RULES,
    "llava": llava.RULES,
    "llava_next": llava_next.RULES,
    "llava_onevision": llava_onevision.RULES,
    "mllama": mllama.RULES,
    "paligemma": paligemma.RULES,
    "qwen2_5_vl": qwen2_5_vl.RULES,
    "qwen2_vl": qwen2_vl.RULES,
    "qwen3_vl": qwen3_vl.RULES,
    "siglip": siglip.RULES,
    "siglip2": siglip2.RULES,
    "smolvlm": smolvlm.RULES,
    "vipllava": vipllava.RULES,
}
OPS = frozenset({"patch_embed", "layer_norm", "rms_norm"}) | {
    fusion.op for rules in FAMILIES.values() for fusions in rules.values() for fusion in fusions
}


def fusions_of(module: nn.Module) -> tuple[type[Fusion], ...]:
    """Return what a module may compute with, by its class's place in transformers and by its structure.

    A method that this version of transformers does not have is not replaced.
    """
    cls = known_class(module)
    rules = FAMILIES.get(family_of(cls) or "", {})
    named = (f for f in rules.get(cls.__name__, ()) if all(hasattr(cls, name) for name in f.overrides))
    return (*named, *by_structure(module))


def known_class(module: nn.Module) -> type:
    """Return a module's class; of a class that somebody derived from one of transformers, that one."""
    cls: type = getattr(type(module), ORIGINAL, type(module))
    return next((base for base in cls.__mro__ if family_of(base) is not None), cls)


def family_of(cls: type) -> str | None:
    """Return the package of transformers' models that a class stands in."""
    found = re.fullmatch(r"transformers\.models\.(\w+)\.\w+", cls.__module__)
    return found[1] if found else None


def unknown_families(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return the whole models of transformers in a model whose family has no rules: name, module, family."""
    found, seen = [], set()
    for name, module in model.named_modules():
        family = family_of(known_class(module))
        if family and family not in FAMILIES and family not in seen and hasattr(module, "config_class"):
            found.append((name, module, family))
            seen.add(family)
    return found
