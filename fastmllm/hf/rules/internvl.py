"""InternVL (arXiv 2404.16821)."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import InsertFeatures
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP
from fastmllm.hf.fused.pixel_shuffle import GridPixelShuffle

RULES = {
    "InternVLMultiModalProjector": (GeluMLP,),
    "InternVLVisionMLP": (GeluMLP,),
    "InternVLModel": (InsertFeatures, GridPixelShuffle),
    "InternVLForConditionalGeneration": (HeadLoss,),
}
