"""Llama-3.2-Vision. Keys and values of images stand in the cache of `generate` already."""

from __future__ import annotations

from fastmllm.hf.fused.gates import MllamaGatedLayer
from fastmllm.hf.fused.liger import GatedMLP
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP
from fastmllm.hf.fused.tile_attention import TileAttention

RULES = {
    "MllamaVisionMLP": (GeluMLP,),
    "MllamaTextMLP": (GatedMLP,),
    "MllamaCrossAttentionDecoderLayer": (MllamaGatedLayer,),
    "MllamaTextCrossAttention": (TileAttention,),
    "MllamaForConditionalGeneration": (HeadLoss,),
}
