"""Idefics2 (arXiv 2405.02246)."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import MergeFeatures
from fastmllm.hf.fused.liger import GatedMLP
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP
from fastmllm.hf.fused.resampler_attention import PaddingFirst, ResamplerAttention

RULES = {
    "Idefics2VisionMLP": (GeluMLP,),
    "Idefics2MLP": (GatedMLP,),
    "Idefics2PerceiverResampler": (PaddingFirst,),
    "Idefics2PerceiverAttention": (ResamplerAttention,),
    "Idefics2Model": (MergeFeatures,),
    "Idefics2ForConditionalGeneration": (HeadLoss,),
}
