"""CogAgent's cross module: inside every layer the text looks at the tokens of a high-resolution tower."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastmllm.kernels.cross_attention import cross_attention
from fastmllm.modules.cross_attention import packed_keys_values
from fastmllm.modules.rms_norm import RMSNorm


@dataclass(frozen=True, kw_only=True, slots=True)
class HighResConfig:
    """Say the shape of CogAgent's cross module.

    Args:
        width: of the language model (D).
        media_width: of the high-resolution tower (Dm).
        num_heads: attention heads, those of the language model.
        head_dim: width of a head; far below the language model's, which is what makes 6,400 keys affordable.
        norm_eps: of the norm in front.
    """

    width: int = 4096
    media_width: int = 1024
    num_heads: int = 32
    head_dim: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("width", "media_width", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"HighResConfig: {name} must be >= 1, got {getattr(self, name)}")
        if self.norm_eps <= 0:
            raise ValueError(f"HighResConfig: norm_eps must be positive, got {self.norm_eps}")


class HighResCrossAttention(nn.Module):
    """x + dense(attention(RMSNorm(x), media)), between a layer's self-attention and its MLP.

    There is no gate: a fresh module changes the language model. No layer has a bias, so a row that sees no media leaves
    as it came.

    Args:
        config: the shape.

    Equal to CrossAttention behind `post_cross_attention_layernorm` in THUDM's modeling_cogagent.py (arXiv 2312.08914).
    That code reshapes the heads' output to the tower's width, which holds only where heads times head width is that
    width; here it is heads times head width.
    """

    def __init__(self, config: HighResConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.num_heads * config.head_dim
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.q_proj = nn.Linear(config.width, inner, bias=False)
        self.kv_proj = nn.Linear(config.media_width, 2 * inner, bias=False)
        self.o_proj = nn.Linear(inner, config.width, bias=False)

    def keys_values(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Project the tower's tokens; a decoding loop keeps the result.

        Args:
            media: (N, Dm) tokens of all images.

        Returns:
            Keys and values, (N, H, Dh) each.

        Raises:
            ValueError: media are not packed, or of another width.
        """
        return packed_keys_values("HighResCrossAttention", self.kv_proj, None, media, self.config.head_dim)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor, max_tokens: int) -> Tensor:
        """Add what the packed text sees.

        Args:
            x: (T, D) hidden rows behind the self-attention's residual.
            k: (N, H, Dh), from `keys_values`.
            v: (N, H, Dh).
            start: (T,) int32, the first token that a row sees, counted in the packed N.
            stop: (T,) int32, the token behind the last one; start >= stop: the row sees none.
            max_tokens: tokens of the longest range, host.

        Returns:
            (T, D), the residual stream for the layer's MLP.

        Raises:
            ValueError: shapes do not fit.
        """
        config = self.config
        if x.dim() != 2 or x.shape[1] != config.width:
            raise ValueError(f"HighResCrossAttention: x must be packed (T, {config.width}), got {tuple(x.shape)}")
        q = self.q_proj(self.norm(x)).unflatten(-1, (config.num_heads, config.head_dim))  # (T, H, Dh)
        return x + self.o_proj(cross_attention(q, k, v, start, stop, max_seqlen_k=max_tokens).flatten(1))
