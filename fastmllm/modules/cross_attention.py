"""Feature-level fusion: gated cross-attention in front of a language model's layers (Flamingo, Idefics, Llama-3.2).

Shapes: T text rows, N media tokens of all images packed, D the language model's width, H and Hkv heads of width Dh.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmllm.kernels.cross_attention import cross_attention
from fastmllm.kernels.gated_residual import gated_residual
from fastmllm.modules.mlp import make_mlp
from fastmllm.modules.norms import make_norm

ROWS_WITHOUT_MEDIA = ("zero_attention", "zero_attention_and_ffn")


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossAttentionConfig:
    """Say the shape of a gated cross-attention layer; the class methods are the published variants.

    Args:
        width: of the language model (D).
        media_width: of the media tokens (Dm); they are not normed here.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of a head.
        ffn_width: hidden width of the feed-forward.
        ffn: "gelu" or "swiglu".
        norm: "layer" or "rms", in front of both branches.
        norm_eps: of all norms.
        qk_norm: whether queries and keys are normed, each head for itself, with the same kind of norm.
        channel_gates: a gate a channel (D,) instead of one number (1,), for each branch.
        rows_without_media: what a row that sees no media token gets. "zero_attention": zeros from the attention, its
            feed-forward branch still runs; "zero_attention_and_ffn": it leaves the layer as it came.
    """

    width: int
    media_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    ffn: str = "swiglu"
    norm: str = "rms"
    norm_eps: float = 1e-6
    qk_norm: bool = False
    channel_gates: bool = False
    rows_without_media: str = "zero_attention"

    def __post_init__(self) -> None:
        for name in ("width", "media_width", "num_heads", "num_kv_heads", "head_dim", "ffn_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"CrossAttentionConfig: {name} must be >= 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"CrossAttentionConfig: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        for name, allowed in (
            ("ffn", ("gelu", "swiglu")),
            ("norm", ("layer", "rms")),
            ("rows_without_media", ROWS_WITHOUT_MEDIA),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"CrossAttentionConfig: {name} {getattr(self, name)!r} must be one of {allowed}")
        if self.norm_eps <= 0:
            raise ValueError(f"CrossAttentionConfig: norm_eps must be positive, got {self.norm_eps}")

    @classmethod
    def flamingo(
        cls, *, width: int, media_width: int, num_heads: int = 8, head_dim: int = 64, ffn_ratio: int = 4
    ) -> CrossAttentionConfig:
        """Return OpenFlamingo's: 8 heads of 64 whatever the language model has, LayerNorm, GELU, scalar gates."""
        return cls(
            width=width, media_width=media_width, num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim,
            ffn_width=ffn_ratio * width, ffn="gelu", norm="layer", norm_eps=1e-5,
        )  # fmt: skip

    @classmethod
    def idefics(
        cls, *, width: int, media_width: int, num_heads: int, ffn_width: int, norm_eps: float = 1e-6,
        qk_norm: bool = False, channel_gates: bool = False,
    ) -> CrossAttentionConfig:  # fmt: skip
        """Return Idefics': the language model's heads and gated MLP, RMSNorm."""
        return cls(
            width=width, media_width=media_width, num_heads=num_heads, num_kv_heads=num_heads,
            head_dim=width // num_heads, ffn_width=ffn_width, norm_eps=norm_eps, qk_norm=qk_norm,
            channel_gates=channel_gates,
        )  # fmt: skip

    @classmethod
    def mllama(
        cls, *, width: int, num_heads: int, num_kv_heads: int, ffn_width: int, norm_eps: float = 1e-5,
        rows_without_media: str = "zero_attention_and_ffn",
    ) -> CrossAttentionConfig:  # fmt: skip
        """Return Llama-3.2-Vision's: grouped heads with normed queries and keys, media of the model's width."""
        return cls(
            width=width, media_width=width, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=width // num_heads, ffn_width=ffn_width, norm_eps=norm_eps, qk_norm=True,
            rows_without_media=rows_without_media,
        )  # fmt: skip


class GatedCrossAttention(nn.Module):
    """Let text rows look at media tokens: x + tanh(a) attention(norm(x), media), then x + tanh(b) FFN(norm(x)).

    Both gates start at 0, so a fresh layer leaves the language model exactly as it was. No layer has a bias.

    Args:
        config: the shape and the variant.

    Equal to OpenFlamingo's GatedCrossAttentionBlock (arXiv 2204.14198, 2308.01390) and transformers'
    IdeficsGatedCrossAttentionLayer (arXiv 2306.16527); to MllamaCrossAttentionDecoderLayer (Llama-3.2-Vision) on rows
    that see media, and to Meta's original on those that do not.
    """

    def __init__(self, config: CrossAttentionConfig) -> None:
        super().__init__()
        self.config = config
        width, head_dim = config.width, config.head_dim
        self.norm = make_norm(config.norm, width, config.norm_eps)
        self.q_proj = nn.Linear(width, config.num_heads * head_dim, bias=False)
        self.kv_proj = nn.Linear(config.media_width, 2 * config.num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * head_dim, width, bias=False)
        self.q_norm = make_norm(config.norm, head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = make_norm(config.norm, head_dim, config.norm_eps) if config.qk_norm else None
        gate = width if config.channel_gates else 1
        self.attn_gate = nn.Parameter(torch.zeros(gate))
        # the norm behind the first gate runs in the gate's pass, so its parameters are this module's own
        self.ffn_norm_weight = nn.Parameter(torch.ones(width))
        self.ffn_norm_bias = nn.Parameter(torch.zeros(width)) if config.norm == "layer" else None
        self.ffn = make_mlp(config.ffn, width, config.ffn_width)
        self.ffn_gate = nn.Parameter(torch.zeros(gate))

    def keys_values(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Project media tokens; a decoding loop keeps the result.

        Args:
            media: (N, Dm) tokens of all images.

        Returns:
            Keys and values, (N, Hkv, Dh) each.

        Raises:
            ValueError: media are not packed, or of another width.
        """
        return packed_keys_values("GatedCrossAttention", self.kv_proj, self.k_norm, media, self.config.head_dim)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor, max_tokens: int) -> Tensor:
        """Run the layer on packed text.

        Args:
            x: (T, D) hidden rows of all samples.
            k: (N, Hkv, Dh), from `keys_values`.
            v: (N, Hkv, Dh).
            start: (T,) int32, the first media token that a row sees, counted in the packed N.
            stop: (T,) int32, the token behind the last one; start >= stop: the row sees none.
            max_tokens: media tokens of the longest range, host.

        Returns:
            (T, D).

        Raises:
            ValueError: shapes do not fit.
        """
        config = self.config
        if x.dim() != 2 or x.shape[1] != config.width:
            raise ValueError(f"GatedCrossAttention: x must be packed (T, {config.width}), got {tuple(x.shape)}")
        q = self.q_proj(self.norm(x)).unflatten(-1, (config.num_heads, config.head_dim))  # (T, H, Dh)
        if self.q_norm is not None:
            q = self.q_norm(q)
        y = self.o_proj(cross_attention(q, k, v, start, stop, max_seqlen_k=max_tokens).flatten(1))
        x, y = gated_residual(
            x, y, self.attn_gate, self.ffn_norm_weight, self.ffn_norm_bias, config.norm_eps, config.norm
        )
        y = self.ffn(y)
        if config.rows_without_media == "zero_attention_and_ffn":
            y = y.masked_fill((start >= stop)[:, None], 0.0)
        return gated_residual(x, y, self.ffn_gate)


def packed_keys_values(
    name: str, kv_proj: nn.Linear, k_norm: nn.Module | None, media: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Project packed media (N, Dm) to keys and values (N, Hkv, Dh); `name` is what a message calls the layer."""
    if media.dim() != 2 or media.shape[1] != kv_proj.in_features:
        raise ValueError(f"{name}: media must be packed (N, {kv_proj.in_features}), got {tuple(media.shape)}")
    k, v = kv_proj(media).unflatten(-1, (2, -1, head_dim)).unbind(1)
    return k if k_norm is None else k_norm(k), v
