"""All tiny models of transformers, by family."""

from __future__ import annotations

from tiny_hf_llava import FAMILIES as LLAVA

FAMILIES = [*LLAVA]
NAMED = {family.name: family for family in FAMILIES}
