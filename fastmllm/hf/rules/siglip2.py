"""SigLIP 2 with variable patch grids (arXiv 2502.14786)."""

from __future__ import annotations

from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "Siglip2MLP": (GeluMLP,),
}
