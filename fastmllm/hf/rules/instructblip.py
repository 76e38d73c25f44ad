"""InstructBLIP (arXiv 2305.06500)."""

from __future__ import annotations

from fastmllm.hf.fused.inner_loss import InnerHeadLoss
from fastmllm.hf.fused.insertion import InsertUncounted

RULES = {
    "InstructBlipModel": (InsertUncounted,),
    "InstructBlipForConditionalGeneration": (InsertUncounted, InnerHeadLoss),
}
