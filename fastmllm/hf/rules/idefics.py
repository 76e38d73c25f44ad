"""Idefics (arXiv 2306.16527), an open Flamingo (arXiv 2204.14198)."""

from __future__ import annotations

from fastmllm.hf.fused.gated_cross_attention import ImageKeysOnce
from fastmllm.hf.fused.gates import GatedLayer
from fastmllm.hf.fused.latent_attention import PerceiverAttention
from fastmllm.hf.fused.liger import GatedMLP
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "IdeficsVisionMLP": (GeluMLP,),
    "IdeficsMLP": (GatedMLP,),
    "IdeficsGatedCrossAttentionLayer": (GatedLayer, ImageKeysOnce),
    "IdeficsPerceiverAttention": (PerceiverAttention,),
    "IdeficsForVisionText2Text": (HeadLoss,),
}
