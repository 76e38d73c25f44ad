"""ViP-LLaVA: LLaVA on features of several layers (arXiv 2312.00784)."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import InsertFeatures
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "VipLlavaMultiModalProjector": (GeluMLP,),
    "VipLlavaModel": (InsertFeatures,),
    "VipLlavaForConditionalGeneration": (HeadLoss,),
}
