"""PaliGemma 1 and 2 (arXiv 2407.07726, 2412.03555)."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import InsertFeatures
from fastmllm.hf.fused.loss import HeadLoss

RULES = {
    "PaliGemmaModel": (InsertFeatures,),
    "PaliGemmaForConditionalGeneration": (HeadLoss,),
}
