"""Qwen2-VL (arXiv 2409.12191)."""

from __future__ import annotations

from fastmllm.hf.fused.insertion import InsertImagesAndVideos
from fastmllm.hf.fused.liger import GatedMLP
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP
from fastmllm.hf.fused.tower_attention import TowerAttention
from fastmllm.hf.fused.tower_grids import TowerGrids

RULES = {
    "VisionMlp": (GeluMLP,),
    "Qwen2MLP": (GatedMLP,),
    "Qwen2VisionTransformerPretrainedModel": (TowerGrids,),
    "VisionAttention": (TowerAttention,),
    "Qwen2VLModel": (InsertImagesAndVideos,),
    "Qwen2VLForConditionalGeneration": (HeadLoss,),
}
