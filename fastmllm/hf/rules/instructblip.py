"""InstructBLIP (arXiv 2305.06500)."""

from __future__ import annotations

from fastmllm.hf.fused.inner_loss import InnerHeadLoss
from fastmllm.hf.fused.insertion import InsertUncounted
from fastmllm.hf.fused.latent_attention import AddNorm, QFormerCrossAttention
from fastmllm.hf.fused.mlp import GeluMLP

RULES = {
    "InstructBlipMLP": (GeluMLP,),
    "InstructBlipQFormerMultiHeadAttention": (QFormerCrossAttention,),
    "InstructBlipQFormerSelfOutput": (AddNorm,),
    "InstructBlipQFormerOutput": (AddNorm,),
    "InstructBlipModel": (InsertUncounted,),
    "InstructBlipForConditionalGeneration": (InsertUncounted, InnerHeadLoss),
}
