"""SigLIP (arXiv 2303.15343)."""

from __future__ import annotations

from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "SiglipMLP": (GeluMLP,),
}
