"""Llama-3.2-Vision.

Its cross-attention stays transformers': the layer gets an additive mask, and to find ranges of tiles in that the host
would wait for the device. Keys and values of images stand in the cache of `generate` already.
"""

from __future__ import annotations

from fastmllm.hf.fused.gated_cross_attention import MllamaGatedLayer
from fastmllm.hf.fused.liger import GatedMLP
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "MllamaVisionMLP": (GeluMLP,),
    "MllamaTextMLP": (GatedMLP,),
    "MllamaCrossAttentionDecoderLayer": (MllamaGatedLayer,),
    "MllamaForConditionalGeneration": (HeadLoss,),
}
