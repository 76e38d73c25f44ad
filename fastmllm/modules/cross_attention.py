"""Feature-level fusion: Flamingo's gated cross-attention block, put in front of a language model's layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.kernels.cross_attention import cross_attention
from fastmllm.kernels.gated_residual import gated_residual
from fastmllm.modules.layer_norm import LayerNorm


class GatedCrossAttention(nn.Module):
    """Let text rows look at media tokens: x + tanh(a) attention(LN(x), media), then x + tanh(b) FFN(x).

    Both gates start at 0, so a fresh block leaves the language model exactly as it was. A row that sees no media gets
    zeros from the attention; the feed-forward branch still runs, as in OpenFlamingo.

    Args:
        width: of the language model (D).
        media_width: of the media tokens; they are not normed here.
        num_heads: attention heads, whatever the language model has.
        head_dim: width of a head.
        ffn_ratio: width of the feed-forward's middle over `width`.

    Equal to OpenFlamingo's GatedCrossAttentionBlock (arXiv 2204.14198, 2308.01390); no layer has a bias.
    """

    def __init__(
        self, width: int, media_width: int, *, num_heads: int = 8, head_dim: int = 64, ffn_ratio: int = 4
    ) -> None:
        super().__init__()
        if min(width, media_width, num_heads, head_dim, ffn_ratio) < 1:
            raise ValueError(
                f"GatedCrossAttention: sizes must be >= 1, got {width=}, {media_width=}, {num_heads=}, {head_dim=}, "
                f"{ffn_ratio=}"
            )
        self.num_heads, self.head_dim, self.media_width = num_heads, head_dim, media_width
        inner = num_heads * head_dim
        self.norm = LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ffn_norm = LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn_ratio * width, bias=False)
        self.fc2 = nn.Linear(ffn_ratio * width, width, bias=False)
        self.ffn_gate = nn.Parameter(torch.zeros(1))

    def project_media(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (N, H, Dh) of `media` (N, media_width); a decoding loop keeps them."""
        if media.dim() != 2 or media.shape[1] != self.media_width:
            raise ValueError(
                f"GatedCrossAttention: media must be packed (N, {self.media_width}), got {tuple(media.shape)}"
            )
        k, v = self.to_kv(media).view(media.shape[0], 2, self.num_heads, self.head_dim).unbind(1)
        return k, v

    def forward(self, x: Tensor, media: Tensor, media_start: Tensor, media_stop: Tensor) -> Tensor:
        """Run the block on packed text.

        Args:
            x: (T, D) hidden rows of all samples.
            media: (N, media_width) tokens of all images.
            media_start: (T,) int32, the first media token that a row sees, counted in the packed N.
            media_stop: (T,) int32, the token behind the last one; start >= stop: the row sees none.

        Returns:
            (T, D).

        Raises:
            ValueError: shapes do not fit.
        """
        return self.attend(x, *self.project_media(media), media_start, media_stop)

    def attend(self, x: Tensor, k: Tensor, v: Tensor, media_start: Tensor, media_stop: Tensor) -> Tensor:
        """Run the block on keys and values (N, H, Dh) that `project_media` returned."""
        q = self.to_q(self.norm(x)).view(x.shape[0], self.num_heads, self.head_dim)
        y = cross_attention(q, k, v, media_start, media_stop)
        x = gated_residual(x, self.to_out(y.flatten(1)), self.attn_gate)
        return gated_residual(x, self.fc2(F.gelu(self.fc1(self.ffn_norm(x)))), self.ffn_gate)
