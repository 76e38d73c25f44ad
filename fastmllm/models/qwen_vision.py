"""Vision towers of native resolution: Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923), Qwen3-VL (2511.21631).

Shapes: M patches of all images and frames, packed, in blocks of merge_size x merge_size; N = M / merge_size^2 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.kernels._rope_tables import axial_rope_tables, grid_positions
from fastmllm.kernels.attention import attention
from fastmllm.kernels.gelu_mlp import gelu_mlp
from fastmllm.kernels.patch_embed import flatten_images
from fastmllm.kernels.vision_rope import vision_rope
from fastmllm.models.encoder import segment_bounds
from fastmllm.modules.gelu_mlp import ACTIVATIONS, GeluMLP
from fastmllm.modules.layer_norm import LayerNorm
from fastmllm.modules.patch_embed import PatchEmbed
from fastmllm.modules.rms_norm import RMSNorm

_EPS = 1e-6  # of every norm of the three families
_NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layer": LayerNorm, "rms": RMSNorm}


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenVisionConfig:
    """Describe a tower; the defaults are the published Qwen2.5-VL's, but for `out_width` and the windows.

    Args:
        width, depth, num_heads: of the transformer.
        mlp_width: inner width of a block's MLP.
        out_width: of the tokens: the language model's width.
        patch_size: pixels of a patch on a side.
        temporal_patch_size: frames of a patch; a still image stands for as many equal frames.
        merge_size: patches on a side that become one token.
        norm: "rms" (Qwen2.5-VL) or "layer".
        activation: "silu" makes a gated MLP (Qwen2.5-VL); "gelu", "gelu_tanh" (Qwen3-VL) or "quick_gelu" (Qwen2-VL).
        patch_bias: whether the patch embedding has a bias.
        position_grid: side of the learned position table (Qwen3-VL), or None.
        window: tokens on a side of an attention window, or None: every block attends to the whole frame.
        full_layers: blocks that attend to the whole frame although there are windows.
        deepstack_layers: blocks whose output goes to the language model's early layers too, ascending.
        rope_theta: base of the rotary frequencies.
        pixel_mean, pixel_std: per channel, in units of 0..1.
    """

    width: int = 1280
    depth: int = 32
    num_heads: int = 16
    mlp_width: int = 3420
    out_width: int = 3584
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    channels: int = 3
    norm: str = "rms"
    activation: str = "silu"
    patch_bias: bool = False
    position_grid: int | None = None
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    deepstack_layers: tuple[int, ...] = ()
    rope_theta: float = 10000.0
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        sizes = [self.width, self.depth, self.num_heads, self.mlp_width, self.out_width, self.patch_size, self.channels]
        sizes += [n for n in (self.window, self.position_grid) if n is not None]
        if min(*sizes, self.temporal_patch_size, self.merge_size) < 1:
            raise ValueError(f"QwenVisionConfig: every size must be at least 1, got {self}")
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"QwenVisionConfig: width {self.width} is not a multiple of 4 * num_heads {self.num_heads}: rows and "
                "columns turn a quarter of a head's pairs each"
            )
        if self.norm not in _NORMS:
            raise ValueError(f"QwenVisionConfig: norm {self.norm!r} is not one of {sorted(_NORMS)}")
        if self.activation not in ("silu", *ACTIVATIONS):
            raise ValueError(f"QwenVisionConfig: activation {self.activation!r} is not silu or {sorted(ACTIVATIONS)}")
        for name, layers in (("full_layers", self.full_layers), ("deepstack_layers", self.deepstack_layers)):
            if any(not 0 <= k < self.depth for k in layers) or list(layers) != sorted(set(layers)):
                raise ValueError(f"QwenVisionConfig: {name} {layers} must ascend within 0..{self.depth - 1}")


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """What a tower returns.

    Args:
        tokens: (N, D) of all images, packed.
        planes: for each early layer of the language model what is added to it at the visual rows, (N, D) each;
            empty without DeepStack.
    """

    tokens: Tensor
    planes: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class _Pass:
    """Positions and boundaries of one forward, shared by the blocks."""

    cos: Tensor  # (M, Dh / 2) fp32
    sin: Tensor
    frames: tuple[Tensor, int]  # cu_seqlens and its longest segment
    windows: tuple[Tensor, int]


class Attention(nn.Module):
    """Attend within segments, q and k turned by rows and columns; q, k and v in one product."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.width // config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Transform (M, D) to (M, D)."""
        qkv = self.qkv(x).view(-1, 3 * self.num_heads, self.head_dim)
        q, k, v = vision_rope(qkv, cos, sin, self.num_heads)
        return self.proj(attention(q, k, v, cu_seqlens, max_seqlen_q=max_seqlen).flatten(1))


class GatedMLP(nn.Module):
    """Gated MLP with biases, down(silu(gate(x)) * up(x)) (arXiv 2002.05202); gate and up in one product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (M, D) to (M, D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm block; its last add is left to the next norm, which does both in one pass."""

    def __init__(self, config: QwenVisionConfig, layer: int) -> None:
        super().__init__()
        norm = _NORMS[config.norm]
        self.whole = config.window is None or layer in config.full_layers
        self.norm1 = norm(config.width, _EPS)
        self.attn = Attention(config)
        self.norm2 = norm(config.width, _EPS)
        self.mlp = (
            GatedMLP(config.width, config.mlp_width)
            if config.activation == "silu"
            else GeluMLP(config.width, config.mlp_width, config.activation)
        )

    def forward(self, x: Tensor, branch: Tensor | None, context: _Pass) -> tuple[Tensor, Tensor]:
        """Run the block on x + branch; return its residual stream and its last branch, not yet added, (M, D) each."""
        if branch is None:
            y = self.norm1(x)
        else:
            y, x = self.norm1.add(branch, x)
        y = self.attn(y, context.cos, context.sin, *(context.frames if self.whole else context.windows))
        y, x = self.norm2.add(y, x)
        return x, self.mlp(y)


class PatchMerger(nn.Module):
    """Join merge_size x merge_size patches, which lie one after another, and project them: norm, linear, GELU, linear.

    Args:
        config: of the tower.
        norm_joined: norm each token of joined patches (Qwen3-VL's DeepStack) and not each patch.
    """

    def __init__(self, config: QwenVisionConfig, norm_joined: bool = False) -> None:
        super().__init__()
        joined = config.width * config.merge_size**2
        self.joined, self.norm_joined = joined, norm_joined
        self.norm = _NORMS[config.norm](joined if norm_joined else config.width, _EPS)
        self.weight1, self.bias1 = nn.Parameter(torch.empty(joined, joined)), nn.Parameter(torch.zeros(joined))
        self.weight2 = nn.Parameter(torch.empty(config.out_width, joined))
        self.bias2 = nn.Parameter(torch.zeros(config.out_width))

    def forward(self, x: Tensor) -> Tensor:
        """Turn patches (M, D) into tokens (N, out_width)."""
        x = self.norm(x.reshape(-1, self.joined)) if self.norm_joined else self.norm(x).view(-1, self.joined)
        return gelu_mlp(x, self.weight1, self.bias1, self.weight2, self.bias2)


class QwenVision(nn.Module):
    """Encode images and videos at their own sizes.

    Args:
        config: sizes and variants.

    Equal to Qwen2VisionTransformerPretrainedModel, Qwen2_5_VisionTransformerPretrainedModel and Qwen3VLVisionModel of
    transformers for the same weights (`pooler_output`, and `deepstack_features` as planes).
    """

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.stride = config.out_width, config.patch_size * config.merge_size
        self.patch_embed = PatchEmbed(
            config.patch_size, config.width, config.channels, config.patch_bias, config.position_grid,
            config.pixel_mean, config.pixel_std, config.temporal_patch_size, mode="bilinear", align_corners=True,
        )  # fmt: skip
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.depth)])
        self.merger = PatchMerger(config)
        self.deepstack = nn.ModuleList([PatchMerger(config, norm_joined=True) for _ in config.deepstack_layers])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw linear weights at 0.02, zero the biases."""
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "bias1", "bias2")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2 and not name.startswith("patch_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def num_tokens(self, grid: Sequence[int]) -> int:
        """Return the tokens that an image of (t, h, w) patches becomes."""
        t, h, w = grid
        return t * (h // self.config.merge_size) * (w // self.config.merge_size)

    def forward(
        self, pixels: Tensor | Sequence[Tensor], grid_thw: Sequence[Sequence[int]] | None = None
    ) -> VisualTokens:
        """Encode a batch.

        Args:
            pixels: a list of images (H, W, C) and videos (F, H, W, C), uint8 or floats in 0..1, F a multiple of
                temporal_patch_size, H and W multiples of `stride`; or the patches (M, C * T * P * P) that a processor
                of transformers has normalised and cut (`pixel_values`).
            grid_thw: (t, h, w) patches of each image, on the host; of patches only: a list has its own sizes.

        Returns:
            Tokens and DeepStack planes, image after image, each frame row by row.

        Raises:
            ValueError: sizes do not fit.
        """
        rows, grids = self.encode(pixels, grid_thw)
        return self.merge(rows, grids)

    def encode(
        self, pixels: Tensor | Sequence[Tensor], grid_thw: Sequence[Sequence[int]] | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[tuple[int, int, int], ...]]:
        """Run the blocks, without the mergers.

        Args:
            pixels, grid_thw: as `forward`.

        Returns:
            Hidden states (M, width) of all patches behind the last block and behind each of `deepstack_layers`, image
            after image, in the order of attention windows; and (t, h, w) of each image.
        """
        x, grids = self._embed(pixels, grid_thw)
        config = self.config
        positions = grid_positions(grids, config.merge_size, x.device)
        frames = windows = segment_bounds([h * w for t, h, w in grids for _ in range(t)], x.device)
        if config.window is not None:
            places, _, lengths = window_order(grids, config.merge_size, config.window)
            windows = segment_bounds(lengths, x.device)
            order = _move(places, x.device)
            x, positions = self._permute(x, order), self._permute(positions, order)
        cos, sin = axial_rope_tables(positions, config.width // config.num_heads, config.rope_theta)
        context = _Pass(cos, sin, frames, windows)

        branch: Tensor | None = None
        early: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            x, branch = block(x, branch, context)
            if layer in config.deepstack_layers:
                x, branch = x + branch, None
                early.append(x)
        return (x if branch is None else x + branch, *early), grids

    def merge(self, rows: Sequence[Tensor], grids: tuple[tuple[int, int, int], ...]) -> VisualTokens:
        """Make tokens of what `encode` returned."""
        tokens = self.merger(rows[0])
        planes = [merger(early) for merger, early in zip(self.deepstack, rows[1:], strict=True)]
        if self.config.window is not None:
            restore = _move(window_order(grids, self.config.merge_size, self.config.window)[1], tokens.device)
            tokens, *planes = (merged.index_select(0, restore) for merged in (tokens, *planes))
        return VisualTokens(tokens, tuple(planes))

    def _embed(
        self, pixels: Tensor | Sequence[Tensor], grid_thw: Sequence[Sequence[int]] | None
    ) -> tuple[Tensor, tuple[tuple[int, int, int], ...]]:
        """Return the embedded patches (M, D) and their grids."""
        config, merge = self.config, self.config.merge_size
        if isinstance(pixels, Tensor) != (grid_thw is not None):
            raise ValueError("QwenVision: patches come with their grid_thw, a list of images without: it has sizes")
        still = not isinstance(pixels, Tensor) and all(image.dim() == 3 for image in pixels)
        if isinstance(pixels, Tensor):
            flat, grids = self._as_weight(pixels), [(int(t), int(h), int(w)) for t, h, w in grid_thw or ()]
        else:
            frames = config.temporal_patch_size
            if not still:  # beside videos an image is the equal frames that it stands for
                pixels = [x.expand(frames, *x.shape) if x.dim() == 3 else x for x in pixels]
            flat, grids = flatten_images(pixels, config.patch_size, 1 if still else frames)
        for grid in grids:
            if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
                raise ValueError(
                    f"QwenVision: a grid is {grid}, but must be (t, h, w) patches, h and w multiples of merge_size "
                    f"{merge}: resize the image to multiples of {self.stride} pixels"
                )
        if flat.dim() == 2 and len(flat) != sum(t * h * w for t, h, w in grids):
            raise ValueError(f"QwenVision: {len(flat)} patches do not fit the grids {grids[:8]}")
        x, _ = self.patch_embed.forward_packed(flat, grids, merge_size=merge, still=still)
        return x, tuple(grids)

    def _as_weight(self, patches: Tensor) -> Tensor:
        """Bring patches from a processor's (channel, frame, row, column) to the weight's order, channels last."""
        config = self.config
        shape = (config.channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        if patches.dim() != 2 or patches.shape[1] != prod(shape):
            raise ValueError(
                f"QwenVision: patches {tuple(patches.shape)} must be (M, {prod(shape)}); images come in a list"
            )
        return patches.reshape(-1, *shape).permute(0, 2, 3, 4, 1).reshape(patches.shape)

    def _permute(self, rows: Tensor, order: Tensor) -> Tensor:
        """Reorder rows (M, ...) by tokens."""
        joined = self.config.merge_size**2
        return rows.view(-1, joined * rows.shape[1]).index_select(0, order).view(rows.shape)


def _move(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


# numpy and not tensors: one made under torch.inference_mode could not be saved for a later backward
@lru_cache(maxsize=256)
def window_order(
    grids: tuple[tuple[int, int, int], ...], merge_size: int, window: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Order tokens by attention windows; at the right and the lower edge windows are what is left there.

    Args:
        grids: (t, h, w) patches of each image.
        merge_size: patches on a side of a token.
        window: tokens on a side of a window.

    Returns:
        (N,) int64, the token at each place; (N,) int64, the place of each token; the patches of each window.

    Equal to get_vision_window_index of transformers.
    """
    orders, lengths, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for t, h, w in grids:
        frame, row, column = np.indices((t, h // merge_size, w // merge_size)).reshape(3, -1)
        down, across = (-(side // merge_size // -window) for side in (h, w))
        of = (frame * down + row // window) * across + column // window  # the window of each token
        orders.append(start + np.argsort(of, kind="stable"))
        lengths.append(np.bincount(of) * merge_size**2)
        start += of.size
    order = np.concatenate(orders)
    return order, np.argsort(order), tuple(np.concatenate(lengths).tolist())
