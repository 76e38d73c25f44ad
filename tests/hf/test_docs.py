"""docs/drop-in.md names every operator and family that the rules have."""

from __future__ import annotations

import re
from pathlib import Path

from fastmllm.hf.rules import FAMILIES, OPS
from fastmllm.hf.rules.decoders import PACKAGES

PAGE = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text(encoding="utf-8")
NAMES = {
    "blip_2": "BLIP-2", "clip": "CLIP", "dinov2": "DINOv2", "dinov2_with_registers": "with registers",
    "gemma3": "Gemma 3", "idefics": "Idefics", "idefics2": "Idefics2", "idefics3": "Idefics3",
    "instructblip": "InstructBLIP", "internvl": "InternVL", "llava": "LLaVA", "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision", "mllama": "Llama-3.2-Vision", "paligemma": "PaliGemma",
    "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "siglip": "SigLIP",
    "siglip2": "SigLIP 2", "smolvlm": "SmolVLM", "vipllava": "ViP-LLaVA",
}  # fmt: skip


def test_every_operator_has_a_row():
    table = PAGE.partition("## What is replaced")[2].partition("Families with rules")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == OPS


def test_every_family_is_named():
    assert set(NAMES) == set(FAMILIES) - set(PACKAGES)
    said = PAGE.partition("Families with rules of their own:")[2].partition("\n\n")[0]
    assert [name for name in NAMES.values() if name not in said.replace("\n", " ")] == []
