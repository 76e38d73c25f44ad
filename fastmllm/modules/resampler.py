"""Perceiver resamplers: a fixed number of latents reads each image (OpenFlamingo, Idefics, Idefics2).

Shapes: I images, N media tokens of all images packed, L latents an image, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmllm.kernels.cross_attention import cross_attention, segment_ranges
from fastmllm.kernels.insert_features import insert_features
from fastmllm.modules.mlp import MLPS, GatedMLP, make_mlp
from fastmllm.modules.norms import make_norm


@dataclass(frozen=True, kw_only=True, slots=True)
class ResamplerConfig:
    """Say the shape of a Perceiver resampler; the class methods are the published variants.

    Args:
        width: of the latents (D).
        num_latents: tokens that an image becomes (L).
        depth: layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of a head.
        ffn_width: hidden width of the feed-forward.
        ffn: "gelu", "relu" or "swiglu".
        norm: "layer" or "rms".
        norm_eps: of all norms.
        qk_norm: whether queries and keys are normed, each head for itself, with the same kind of norm.
        max_frames: learned embeddings of a token's frame, 0 for none.
        max_media: learned embeddings of an image's place among those of its sample, 0 for none.
        media_width: of the tokens that come in; None means `width`.
        projection_width: None, or the hidden width of a gated MLP from `media_width` to `width` in front.
    """

    width: int
    num_latents: int = 64
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    ffn: str
    norm: str
    norm_eps: float
    qk_norm: bool = False
    max_frames: int = 0
    max_media: int = 0
    media_width: int | None = None
    projection_width: int | None = None

    def __post_init__(self) -> None:
        for name in ("width", "num_latents", "depth", "num_heads", "num_kv_heads", "head_dim", "ffn_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"ResamplerConfig: {name} must be >= 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ResamplerConfig: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        for name, allowed in (("ffn", MLPS), ("norm", ("layer", "rms"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"ResamplerConfig: {name} {getattr(self, name)!r} must be one of {allowed}")
        if self.norm_eps <= 0 or min(self.max_frames, self.max_media) < 0:
            raise ValueError(
                f"ResamplerConfig: norm_eps must be positive, max_frames and max_media not negative, got "
                f"{self.norm_eps}, {self.max_frames}, {self.max_media}"
            )
        if self.projection_width is None and self.media_width not in (None, self.width):
            raise ValueError(
                f"ResamplerConfig: tokens of width {self.media_width} need a projection_width to become {self.width}"
            )

    @classmethod
    def flamingo(
        cls, *, width: int, num_latents: int = 64, depth: int = 6, num_heads: int = 8, head_dim: int = 64,
        max_frames: int = 0, max_media: int = 0,
    ) -> ResamplerConfig:  # fmt: skip
        """Return OpenFlamingo's: LayerNorm, GELU, optional embeddings of frames and of images."""
        return cls(
            width=width, num_latents=num_latents, depth=depth, num_heads=num_heads, num_kv_heads=num_heads,
            head_dim=head_dim, ffn_width=4 * width, ffn="gelu", norm="layer", norm_eps=1e-5, max_frames=max_frames,
            max_media=max_media,
        )  # fmt: skip

    @classmethod
    def idefics(
        cls, *, width: int, num_latents: int = 64, depth: int = 6, num_heads: int = 16, head_dim: int = 96,
        qk_norm: bool = False,
    ) -> ResamplerConfig:  # fmt: skip
        """Return Idefics': LayerNorm, ReLU, optional norms of queries and keys."""
        return cls(
            width=width, num_latents=num_latents, depth=depth, num_heads=num_heads, num_kv_heads=num_heads,
            head_dim=head_dim, ffn_width=4 * width, ffn="relu", norm="layer", norm_eps=1e-5, qk_norm=qk_norm,
        )  # fmt: skip

    @classmethod
    def idefics2(
        cls, *, width: int, num_latents: int = 64, depth: int = 3, num_heads: int = 16, num_kv_heads: int = 4,
        head_dim: int = 96, norm_eps: float = 1e-6, media_width: int | None = None, projection_width: int | None = None,
    ) -> ResamplerConfig:  # fmt: skip
        """Return Idefics2's: grouped heads, RMSNorm, SwiGLU, the modality projection in front."""
        return cls(
            width=width, num_latents=num_latents, depth=depth, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim, ffn_width=4 * width, ffn="swiglu", norm="rms", norm_eps=norm_eps,
            media_width=media_width, projection_width=projection_width,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Where the latents stand among the keys: behind the media tokens of their image."""

    latent_rows: Tensor  # (I * L,) int64, in the N + I * L keys
    start: Tensor  # (I * L,) int32, the keys that a latent sees
    stop: Tensor
    max_keys: int


class ResamplerLayer(nn.Module):
    """Latents attend to their image and to themselves; a feed-forward follows."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        width, head_dim, eps = config.width, config.head_dim, config.norm_eps
        self.media_norm = make_norm(config.norm, width, eps)
        self.latents_norm = make_norm(config.norm, width, eps)
        self.q_proj = nn.Linear(width, config.num_heads * head_dim, bias=False)
        self.kv_proj = nn.Linear(width, 2 * config.num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * head_dim, width, bias=False)
        self.q_norm = make_norm(config.norm, head_dim, eps) if config.qk_norm else None
        self.k_norm = make_norm(config.norm, head_dim, eps) if config.qk_norm else None
        self.ffn_norm = make_norm(config.norm, width, eps)
        self.ffn = make_mlp(config.ffn, width, config.ffn_width)

    def forward(self, latents: Tensor, branch: Tensor | None, media: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        """Run the layer on latents + branch; return its stream and its last branch, not yet added, (I * L, D) each.

        `media` (N + I * L, D) has a gap behind each image, where the normed latents go.
        """
        config = self.config
        y, latents = (self.latents_norm(latents), latents) if branch is None else self.latents_norm.add(branch, latents)
        seen = insert_features(self.media_norm(media), y, plan.latent_rows)  # (N + I * L, D)
        q = self.q_proj(y).unflatten(-1, (config.num_heads, config.head_dim))
        k, v = self.kv_proj(seen).unflatten(-1, (2, config.num_kv_heads, config.head_dim)).unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        y = cross_attention(q, k, v, plan.start, plan.stop, max_seqlen_q=config.num_latents, max_seqlen_k=plan.max_keys)
        y, latents = self.ffn_norm.add(self.o_proj(y.flatten(1)), latents)
        return latents, self.ffn(y)


class PerceiverResampler(nn.Module):
    """Turn any number of tokens an image into `num_latents`.

    Args:
        config: the shape and the variant.

    Equal to OpenFlamingo's PerceiverResampler (arXiv 2204.14198, 2308.01390), and to transformers'
    IdeficsPerceiverResampler, Idefics2PerceiverResampler and (with a projection) Idefics2Connector (arXiv 2405.02246).
    """

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.projection = None
        if config.projection_width is not None:
            self.projection = GatedMLP(config.media_width or width, config.projection_width, width)
        self.latents = nn.Parameter(torch.randn(config.num_latents, width))
        self.frame_embedding = nn.Parameter(torch.randn(config.max_frames, width)) if config.max_frames else None
        self.media_embedding = nn.Parameter(torch.randn(config.max_media, width)) if config.max_media else None
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.depth))
        self.norm = make_norm(config.norm, width, config.norm_eps)

    def forward(
        self,
        media: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        frames: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Resample packed images.

        Args:
            media: (N, Dm) tokens of all images, each in as many as it has; no image at all is fine.
            cu_seqlens: (I + 1,) int32 boundaries of the images.
            max_seqlen: tokens of the longest image, host.
            frames: (N,) int64, the frame of each token within its image, where the config has `max_frames`.
            places: (N,) int64, the place of each token's image within its sample, where the config has `max_media`.

        Returns:
            (I * L, D), L rows an image.

        Raises:
            ValueError: shapes do not fit, or an index is missing or not used.
        """
        config = self.config
        if media.dim() != 2 or media.shape[1] != (config.media_width or config.width):
            raise ValueError(
                f"PerceiverResampler: media must be packed (N, {config.media_width or config.width}), got "
                f"{tuple(media.shape)}"
            )
        if cu_seqlens.dim() != 1 or not cu_seqlens.numel():
            raise ValueError(f"PerceiverResampler: cu_seqlens must be (I + 1,), got {tuple(cu_seqlens.shape)}")
        if self.projection is not None:
            media = self.projection(media)
        for name, table, index in (
            ("frames", self.frame_embedding, frames),
            ("places", self.media_embedding, places),
        ):
            if (table is None) != (index is None):
                raise ValueError(
                    f"PerceiverResampler: {name} goes with max_frames {config.max_frames} and max_media "
                    f"{config.max_media}: {'missing' if index is None else 'there is no such embedding'}"
                )
            if table is not None and index is not None:
                if index.shape != media.shape[:1]:
                    raise ValueError(
                        f"PerceiverResampler: {name} {tuple(index.shape)} must name each of the {len(media)} tokens"
                    )
                media = media + table[index]
        media, plan = self._spread(media, cu_seqlens, max_seqlen)
        images = cu_seqlens.numel() - 1
        latents = self.latents.expand(images, -1, -1).reshape(images * config.num_latents, config.width)
        branch: Tensor | None = None
        for layer in self.layers:
            latents, branch = layer(latents, branch, media, plan)
        assert branch is not None
        return self.norm.add(branch, latents)[0]

    def _spread(self, media: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, _Plan]:
        """Leave room for L latents behind each image, once for all layers; the host does not wait for the device."""
        images, latents, device = cu_seqlens.numel() - 1, self.config.num_latents, media.device
        ends = cu_seqlens[1:].long()
        gaps = torch.arange(images + 1, device=device) * latents  # (I + 1,) rows of latents in front of an image
        tokens = torch.arange(len(media), device=device)
        rows = tokens + torch.searchsorted(ends, tokens, right=True) * latents
        latent_rows = ((ends + gaps[:-1])[:, None] + torch.arange(latents, device=device)).flatten()
        spread = insert_features(media.new_zeros(len(media) + images * latents, media.shape[1]), media, rows)
        start, stop = segment_ranges(gaps.int(), (cu_seqlens + gaps).int(), images * latents)
        return spread, _Plan(latent_rows=latent_rows, start=start, stop=stop, max_keys=max_seqlen + latents)
