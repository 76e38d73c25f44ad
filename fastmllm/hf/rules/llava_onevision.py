"""LLaVA-OneVision: tiles, several images and videos (arXiv 2408.03326)."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import InsertImagesAndVideos
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "LlavaOnevisionMultiModalProjector": (GeluMLP,),
    "LlavaOnevisionModel": (InsertImagesAndVideos,),
    "LlavaOnevisionForConditionalGeneration": (HeadLoss,),
}
