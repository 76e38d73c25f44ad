"""LLaVA (arXiv 2304.08485)."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import InsertFeatures
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "LlavaMultiModalProjector": (GeluMLP,),
    "LlavaModel": (InsertFeatures,),
    "LlavaForConditionalGeneration": (HeadLoss,),
}
