"""The index: every public operator, one line each."""

from fastmllm.kernels._rope_tables import axial_rope_tables, grid_positions, mrope_tables
from fastmllm.kernels.attention import attention
from fastmllm.kernels.attention_scores import attention_scores
from fastmllm.kernels.cross_attention import cross_attention, mask_ranges, media_ranges, segment_ranges
from fastmllm.kernels.gated_residual import gated_residual
from fastmllm.kernels.gelu_mlp import gelu_mlp
from fastmllm.kernels.greedy_diverse import greedy_diverse
from fastmllm.kernels.insert_features import insert_features
from fastmllm.kernels.layer_norm import layer_norm
from fastmllm.kernels.linear_cross_entropy import linear_cross_entropy, sequence_log_probs
from fastmllm.kernels.patch_embed import patch_embed, patch_embed_packed, patch_weight
from fastmllm.kernels.pixel_shuffle import pixel_shuffle
from fastmllm.kernels.position_resample import position_resample
from fastmllm.kernels.rms_norm import rms_norm
from fastmllm.kernels.splice_tokens import splice_plan, splice_tokens
from fastmllm.kernels.token_merge import token_merge
from fastmllm.kernels.token_pool import token_pool
from fastmllm.kernels.token_select import token_select
from fastmllm.kernels.vision_rope import vision_rope

__all__ = [
    "attention",
    "attention_scores",
    "axial_rope_tables",
    "cross_attention",
    "gated_residual",
    "gelu_mlp",
    "greedy_diverse",
    "grid_positions",
    "insert_features",
    "layer_norm",
    "linear_cross_entropy",
    "mask_ranges",
    "media_ranges",
    "mrope_tables",
    "patch_embed",
    "patch_embed_packed",
    "patch_weight",
    "pixel_shuffle",
    "position_resample",
    "rms_norm",
    "segment_ranges",
    "sequence_log_probs",
    "splice_plan",
    "splice_tokens",
    "token_merge",
    "token_pool",
    "token_select",
    "vision_rope",
]
