"""Attention pooling: one learned query reads all tokens of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmllm.kernels.attention import attention
from fastmllm.modules.gelu_mlp import GeluMLP
from fastmllm.modules.layer_norm import LayerNorm


class AttentionPool(nn.Module):
    """Turn packed tokens into one vector an image: x = attention(probe, tokens), then x + MLP(LN(x)).

    Args:
        width: of the tokens.
        num_heads: of the attention.
        hidden: width of the MLP's middle.
        activation: of the MLP.
        norm_eps: of the LayerNorm.

    Equal to SigLIP's and SigLIP2's pooling head (arXiv 2303.15343).
    """

    def __init__(self, width: int, num_heads: int, hidden: int, activation: str, norm_eps: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.probe = nn.Parameter(torch.empty(width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = LayerNorm(width, norm_eps)
        self.mlp = GeluMLP(width, hidden, activation)
        nn.init.trunc_normal_(self.probe, std=0.02)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Pool `x` (T, D) with boundaries `cu_seqlens` (I + 1,) int32; return (I, D)."""
        images = cu_seqlens.numel() - 1
        k, v = self.kv(x).view(x.shape[0], 2, self.num_heads, self.head_dim).unbind(1)  # (T, H, Dh) each
        q = self.q(self.probe.to(x.dtype)).view(1, self.num_heads, self.head_dim).expand(images, -1, -1)
        each = torch.arange(images + 1, dtype=torch.int32, device=x.device)
        y = attention(q, k, v, each, cu_seqlens, max_seqlen_q=1, max_seqlen_k=max_seqlen)
        y = self.proj(y.flatten(1))
        return y + self.mlp(self.norm(y))
