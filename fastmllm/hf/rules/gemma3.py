"""Gemma 3 (arXiv 2503.19786)."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import InsertFeatures
from fastmllm.hf.fused.liger import GatedMLP
from fastmllm.hf.fused.loss import HeadLoss

RULES = {
    "Gemma3MLP": (GatedMLP,),
    "Gemma3Model": (InsertFeatures,),
    "Gemma3ForConditionalGeneration": (HeadLoss,),
}
