"""Qwen3-VL (arXiv 2511.21631): DeepStack feeds features of the tower to several layers of the language model."""

from __future__ import annotations

from fastmllm.hf.fused.deepstack import DeepStack
from fastmllm.hf.fused.insertion import InsertImagesAndVideos
from fastmllm.hf.fused.liger import GatedMLP
from fastmllm.hf.fused.loss import HeadLoss
from fastmllm.hf.fused.mlp import GeluMLP
from fastmllm.hf.fused.tower_attention import TowerAttention
from fastmllm.hf.fused.tower_grids import TowerGrids

RULES = {
    "Qwen3VLVisionMLP": (GeluMLP,),
    "Qwen3VLTextMLP": (GatedMLP,),
    "Qwen3VLVisionModel": (TowerGrids,),
    "Qwen3VLVisionAttention": (TowerAttention,),
    "Qwen3VLTextModel": (DeepStack,),
    "Qwen3VLModel": (InsertImagesAndVideos,),
    "Qwen3VLForConditionalGeneration": (HeadLoss,),
}
