"""CLIP (arXiv 2103.00020)."""

from __future__ import annotations

from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "CLIPMLP": (GeluMLP,),
}
