"""SmolVLM (arXiv 2504.05299)."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import InsertFeatures, MergeFeatures
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP
from fastmllm.hf.fused.pixel_shuffle import PixelShuffle

RULES = {
    "SmolVLMVisionMLP": (GeluMLP,),
    "SmolVLMConnector": (PixelShuffle,),
    "SmolVLMModel": (InsertFeatures, MergeFeatures),  # 5.17 merges in a method, later ones at a mask
    "SmolVLMForConditionalGeneration": (HeadLoss,),
}
