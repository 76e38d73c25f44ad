"""BLIP-2 (arXiv 2301.12597)."""

from __future__ import annotations

from fastmllm.hf.fused.inner_loss import InnerHeadLoss
from fastmllm.hf.fused.insertion import InsertUncounted
from fastmllm.hf.fused.latent_attention import AddNorm, QFormerCrossAttention
from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "Blip2MLP": (GeluMLP,),
    "Blip2QFormerMultiHeadAttention": (QFormerCrossAttention,),
    "Blip2QFormerSelfOutput": (AddNorm,),
    "Blip2QFormerOutput": (AddNorm,),
    "Blip2ForConditionalGeneration": (InsertUncounted, InnerHeadLoss),
}
