"""LLaVA-NeXT: LLaVA on tiles of any resolution (https://llava-vl.github.io/blog/2024-01-30-llava-next)."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import InsertFeatures
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "LlavaNextMultiModalProjector": (GeluMLP,),
    "LlavaNextModel": (InsertFeatures,),
    "LlavaNextForConditionalGeneration": (HeadLoss,),
}
