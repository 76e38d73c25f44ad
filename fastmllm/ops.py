"""The index: every public operator, one line each."""

from fastmllm.kernels.attention import attention
from fastmllm.kernels.cross_attention import cross_attention
from fastmllm.kernels.gated_residual import gated_residual
from fastmllm.kernels.insert_features import insert_features
from fastmllm.kernels.layer_norm import layer_norm
from fastmllm.kernels.linear_cross_entropy import linear_cross_entropy
from fastmllm.kernels.patch_embed import patch_embed, patch_embed_packed, patch_weight
from fastmllm.kernels.position_resample import position_resample
from fastmllm.kernels.token_merge import token_merge

__all__ = [
    "attention",
    "cross_attention",
    "gated_residual",
    "insert_features",
    "layer_norm",
    "linear_cross_entropy",
    "patch_embed",
    "patch_embed_packed",
    "patch_weight",
    "position_resample",
    "token_merge",
]
