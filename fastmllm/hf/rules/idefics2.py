"""Idefics2 (arXiv 2405.02246).

Its resampler's attention stays transformers': one call already, with a mask where an image is padded.
"""

from __future__ import annotations

from fastmllm.hf.fused.insertion import MergeFeatures
from fastmllm.hf.fused.liger import GatedMLP
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "Idefics2VisionMLP": (GeluMLP,),
    "Idefics2MLP": (GatedMLP,),
    "Idefics2Model": (MergeFeatures,),
    "Idefics2ForConditionalGeneration": (HeadLoss,),
}
