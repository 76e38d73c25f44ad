"""BLIP-2 (arXiv 2301.12597)."""

from __future__ import annotations

from fastmllm.hf.fused.inner_loss import InnerHeadLoss
from fastmllm.hf.fused.insertion import InsertUncounted

RULES = {
    "Blip2ForConditionalGeneration": (InsertUncounted, InnerHeadLoss),
}
