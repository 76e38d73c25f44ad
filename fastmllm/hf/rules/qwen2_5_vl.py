"""Qwen2.5-VL (arXiv 2502.13923): its tower attends in windows."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import InsertImagesAndVideos
from fastmllm.hf.fused.liger import GatedMLP
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.tower_attention import TowerAttention
from fastmllm.hf.fused.tower_grids import TowerGrids

RULES = {
    "Qwen2_5_VLMLP": (GatedMLP,),
    "Qwen2MLP": (GatedMLP,),
    "Qwen2_5_VisionTransformerPretrainedModel": (TowerGrids,),
    "Qwen2_5_VLVisionAttention": (TowerAttention,),
    "Qwen2_5_VLModel": (InsertImagesAndVideos,),
    "Qwen2_5_VLForConditionalGeneration": (HeadLoss,),
}
