"""DINOv2 (arXiv 2304.07193)."""

from __future__ import annotations

from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "Dinov2MLP": (GeluMLP,),
}
