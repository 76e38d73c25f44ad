"""Idefics3 (arXiv 2408.12637)."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import MergeFeatures
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP
from fastmllm.hf.fused.pixel_shuffle import PixelShuffle

RULES = {
    "Idefics3VisionMLP": (GeluMLP,),
    "Idefics3Connector": (PixelShuffle,),
    "Idefics3Model": (MergeFeatures,),
    "Idefics3ForConditionalGeneration": (HeadLoss,),
}
