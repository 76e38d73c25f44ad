"""DINOv2 with registers (arXiv 2309.16588)."""

from __future__ import annotations

from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "Dinov2WithRegistersMLP": (GeluMLP,),
}
