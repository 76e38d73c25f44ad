"""Vision transformer encoder, pre-LN (Dosovitskiy et al., arXiv 2010.11929), with the variants of the CLIP, SigLIP and
DINOv2 checkpoints as options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.kernels.attention import attention
from fastmllm.models.encoder import Encoder
from fastmllm.modules.layer_norm import LayerNorm
from fastmllm.modules.patch_embed import PatchEmbed


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """Describe a vision transformer; the defaults are DINOv2's ViT-S/14."""

    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    patch_size: int = 14
    image_size: int = 518  # pixels on a side that the position table was made for
    cls_token: bool = True
    layer_scale: float | None = 1.0  # initial value; None: no such parameters
    qkv_bias: bool = True
    patch_bias: bool = True
    activation: str = "gelu"
    norm_eps: float = 1e-6
    pre_norm: bool = False  # CLIP's norm in front of the first block
    final_norm: bool = True
    layer: int | None = None  # return this block's output (1..depth); later blocks are not built
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.num_heads, self.patch_size) < 1 or self.mlp_ratio <= 0:
            raise ValueError("VisionConfig: width, depth, num_heads, patch_size and mlp_ratio must be positive")
        if self.width % self.num_heads:
            raise ValueError(f"VisionConfig: width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(
                f"VisionConfig: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"VisionConfig: activation {self.activation!r} is not one of {sorted(_ACTIVATIONS)}")
        if self.layer is not None and not 1 <= self.layer <= self.depth:
            raise ValueError(f"VisionConfig: layer {self.layer} is not in 1..{self.depth}")

    @property
    def num_blocks(self) -> int:
        """Blocks that run."""
        return self.layer or self.depth


class Attention(nn.Module):
    """Attend over each image's tokens; q, k and v in one product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.width // config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, self.head_dim).unbind(1)  # (T, H, Dh) each
        y = attention(q, k, v, cu_seqlens, max_seqlen_q=max_seqlen, causal=False)
        return self.proj(y.reshape(x.shape))


class MLP(nn.Module):
    """Two linear layers and an activation."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        inner = int(config.width * config.mlp_ratio)
        self.fc1 = nn.Linear(config.width, inner)
        self.fc2 = nn.Linear(inner, config.width)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """One pre-LN block; its last add is left to the next norm, which does both in one pass."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)
        scale = config.layer_scale
        self.scale1 = None if scale is None else nn.Parameter(torch.full((config.width,), float(scale)))
        self.scale2 = None if scale is None else nn.Parameter(torch.full((config.width,), float(scale)))

    def forward(self, x: Tensor, branch: Tensor | None, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
        """Run the block on x + branch; return its residual stream and its last branch, not yet added, (T, D) each."""
        if branch is None:
            y = self.norm1(x)
        else:
            y, x = self.norm1.add(branch, x)
        y = self.attn(y, cu_seqlens, max_seqlen)
        y, x = self.norm2.add(y if self.scale1 is None else y * self.scale1, x)
        y = self.mlp(y)
        return x, y if self.scale2 is None else y * self.scale2


class VisionTransformer(Encoder):
    """Encode images into patch tokens.

    Args:
        config: sizes, variants, pixel normalisation, and the layer to return.

    Equal to transformers' Dinov2Model for the same weights: `last_hidden_state` with `final_norm` and no `layer`,
    `hidden_states[layer]` with `layer` and without `final_norm`.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.stride = config.width, config.patch_size
        self.patch_embed = PatchEmbed(
            config.patch_size,
            config.width,
            bias=config.patch_bias,
            grid=config.image_size // config.patch_size,
            mean=config.pixel_mean,
            std=config.pixel_std,
        )
        self.cls_token = nn.Parameter(torch.zeros(config.width)) if config.cls_token else None
        self.cls_position = nn.Parameter(torch.zeros(config.width)) if config.cls_token else None
        self.pre_norm = LayerNorm(config.width, config.norm_eps) if config.pre_norm else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_blocks)])
        self.norm = LayerNorm(config.width, config.norm_eps) if config.final_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw linear weights at 0.02, zero the biases (DINOv2's initialisation)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images of one size.

        Args:
            pixels: (I, H, W, 3) uint8, or float in 0..1; H and W multiples of the patch size.

        Returns:
            (I, (H / P) * (W / P), D), row-major, without the class token.
        """
        tokens = self.forward_tokens(pixels)
        return tokens if self.cls_token is None else tokens[:, 1:]

    def forward_tokens(self, pixels: Tensor) -> Tensor:
        """Encode images; return (I, S, D) with the class token, if there is one, in front."""
        x = self.patch_embed(pixels)  # (I, N, D)
        if self.cls_token is not None and self.cls_position is not None:
            cls = (self.cls_token + self.cls_position).to(x.dtype)
            x = torch.cat([cls.expand(x.shape[0], 1, -1), x], 1)
        num_images, length, width = x.shape
        x = x.reshape(-1, width)  # (T, D): packed from here on
        cu_seqlens = torch.arange(num_images + 1, dtype=torch.int32, device=x.device) * length
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        branch: Tensor | None = None
        for block in self.blocks:
            x, branch = block(x, branch, cu_seqlens, length)
        assert branch is not None
        x = x + branch if self.norm is None else self.norm.add(branch, x)[0]
        return x.reshape(num_images, length, width)
