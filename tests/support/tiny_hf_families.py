"""All tiny models of transformers, by family."""

from __future__ import annotations

from tiny_hf_fusion import FAMILIES as FUSION
from tiny_hf_llava import FAMILIES as LLAVA
from tiny_hf_qwen import FAMILIES as QWEN
from tiny_hf_towers import FAMILIES as TOWERS

FAMILIES = [*LLAVA, *QWEN, *FUSION, *TOWERS]
NAMED = {family.name: family for family in FAMILIES}
