"""EVA2-CLIP-L (EVA-02, arXiv 2303.11331; EVA-CLIP, arXiv 2303.15389), CogAgent's high-resolution encoder: a pre-norm
vision transformer with 2-D RoPE, SwiGLU, and norms inside attention and MLP.

Its low-resolution sister EVA2-CLIP-E is `VisionTransformer` with `post_norm`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.kernels._rope_tables import axial_rope_tables, grid_positions
from fastmllm.kernels.attention import attention
from fastmllm.kernels.vision_rope import vision_rope
from fastmllm.models.encoder import Encoder
from fastmllm.modules.layer_norm import LayerNorm
from fastmllm.modules.patch_embed import PatchEmbed


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaConfig:
    """Describe EVA2-CLIP-L; the defaults are CogAgent's, whose code leaves the last of 24 blocks out."""

    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_width: int = 2730
    patch_size: int = 14
    image_size: int = 1120  # pixels on a side, no other
    rope_grid: int = 16  # patches on a side in pre-training: positions are stretched to it
    norm_eps: float = 1e-6
    layer: int = 23  # hidden state to return, 1..depth: later blocks are not built
    output_position: bool = True  # CogAgent adds a second position table to the result
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.num_heads, self.mlp_width, self.patch_size, self.rope_grid) < 1:
            raise ValueError("EvaConfig: width, depth, num_heads, mlp_width, patch_size, rope_grid must be positive")
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"EvaConfig: width {self.width} is not a multiple of 4 * num_heads {self.num_heads}: a head turns by "
                "row and column in pairs"
            )
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(
                f"EvaConfig: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if not 1 <= self.layer <= self.depth:
            raise ValueError(f"EvaConfig: layer {self.layer} is not in 1..{self.depth}")


class Attention(nn.Module):
    """Attend with turned q and k; a norm in front of the last layer; q and v have a bias, k has none."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.head_dim = config.num_heads, width // config.num_heads
        self.qkv_weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.norm = LayerNorm(width, config.norm_eps)
        self.proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.qkv_weight, std=0.02)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv_weight, bias).view(x.shape[0], 3 * self.num_heads, self.head_dim)
        q, k, v = vision_rope(qkv, cos, sin, self.num_heads, interleaved=True)
        y = attention(q, k, v, cu_seqlens, max_seqlen_q=max_seqlen)
        return self.proj(self.norm(y.reshape(x.shape)))


class SwiGLU(nn.Module):
    """w3(norm(silu(w1 x) * w2 x)); w1 and w2 in one product."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.width, 2 * config.mlp_width)
        self.norm = LayerNorm(config.mlp_width, config.norm_eps)
        self.w3 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, -1)
        return self.w3(self.norm(F.silu(gate) * up))


class Block(nn.Module):
    """One pre-norm block; its last add is left to the next norm."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, branch: Tensor | None, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        """Run the block on x + branch; return its residual stream and last branch, not yet added, (T, D) each."""
        if branch is None:
            y = self.norm1(x)
        else:
            y, x = self.norm1.add(branch, x)
        y, x = self.norm2.add(self.attn(y, cos, sin, cu_seqlens, max_seqlen), x)
        return x, self.mlp(y)


class EvaVisionTransformer(Encoder):
    """Encode images of one size into patch tokens.

    Args:
        config: sizes, the layer to return, pixel normalisation.

    Equal to CogAgent's `CrossVisionModel` (arXiv 2312.08914): the class token takes part and is dropped, no final norm.
    """

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.stride = config.width, config.patch_size
        grid = config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(
            config.patch_size, config.width, grid=grid, mean=config.pixel_mean, std=config.pixel_std
        )
        self.cls_token, self.cls_position = (nn.Parameter(torch.zeros(config.width)) for _ in range(2))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layer)])
        self.output_position = nn.Parameter(torch.zeros(grid * grid, config.width)) if config.output_position else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixels: (I, S, S, 3) uint8, or float in 0..1; S is the configuration's image_size.

        Returns:
            (I, (S / P)^2, D), row-major, without the class token.

        Raises:
            ValueError: another size.
        """
        size, grid = self.config.image_size, self.config.image_size // self.config.patch_size
        if pixels.dim() != 4 or pixels.shape[1:3] != (size, size):
            raise ValueError(
                f"EvaVisionTransformer: pixels {tuple(pixels.shape)} must be (I, {size}, {size}, 3): resize the images"
            )
        x = self.patch_embed(pixels, prefix=(self.cls_token + self.cls_position)[None])  # (I, 1 + N, D)
        images, length, _ = x.shape
        places = grid_positions([(1, grid, grid)], device=x.device) * (self.config.rope_grid / grid)
        places = F.pad(places, (0, 0, 1, 0))  # the class token does not turn: place (0, 0)
        cos, sin = axial_rope_tables(places.repeat(images, 1), self.config.width // self.config.num_heads)
        cu_seqlens = torch.arange(images + 1, dtype=torch.int32, device=x.device) * length
        x, branch = x.flatten(0, 1), None
        for block in self.blocks:
            x, branch = block(x, branch, cos, sin, cu_seqlens, length)
        assert branch is not None
        y = (x + branch).view(images, length, self.width)[:, 1:]
        return y if self.output_position is None else y + self.output_position
