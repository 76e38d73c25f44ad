"""Vision transformer encoder (Dosovitskiy et al., arXiv 2010.11929), with the variants of the CLIP, SigLIP, SigLIP2,
DINOv2, InternViT, EVA (BLIP-2, CogVLM) and Idefics checkpoints as options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.compression.bipartite_merge import Merger
from fastmllm.compression.budget import Budget, tokens_to_keep
from fastmllm.compression.compressor import Probe, Watch
from fastmllm.compression.merge_schedule import merge_schedule
from fastmllm.compression.selection import take
from fastmllm.compression.tokens import Tokens, boundaries, segments
from fastmllm.kernels.attention import attention
from fastmllm.models.encoder import Encoder
from fastmllm.modules.attention_pool import AttentionPool
from fastmllm.modules.gelu_mlp import ACTIVATIONS, GeluMLP
from fastmllm.modules.layer_norm import LayerNorm
from fastmllm.modules.patch_embed import PatchEmbed
from fastmllm.modules.rms_norm import RMSNorm

# how positions come to a grid that the table was not made for -> PatchEmbed's options
RESAMPLE: Mapping[str, Mapping[str, Any]] = {
    "bicubic": {"mode": "bicubic"},
    "antialias": {"mode": "bilinear", "antialias": True},  # SigLIP2-NaFlex
    "none": {},  # such grids are refused
}


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """Describe a vision transformer; the defaults are DINOv2's ViT-S/14."""

    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0  # the MLP's middle over the width, rounded
    patch_size: int = 14
    image_size: int = 518  # pixels on a side that the position table was made for; a part of a patch does not count
    resample: str = "bicubic"  # how the table comes to other grids: a name in RESAMPLE
    cls_token: bool = True
    layer_scale: float | None = 1.0  # initial value; None: no such parameters
    qkv_bias: bool = True
    qk_norm: bool = False  # RMSNorm over all heads of q and of k (InternViT-6B)
    patch_bias: bool = True
    activation: str = "gelu"
    norm_eps: float = 1e-6
    rms_norm: bool = False  # RMSNorm in the blocks (InternViT-6B)
    pre_norm: bool = False  # CLIP's norm in front of the first block
    post_norm: bool = False  # x + norm(f(x)) in the blocks (EVA2-CLIP-E in CogVLM), not x + f(norm(x))
    final_norm: bool = True
    pool: bool = False  # SigLIP's pooling head behind the final norm
    # Which hidden states to return, as transformers counts them: k is behind block k, 0 the embeddings, -1 behind the
    # last block; several are joined along the channels; blocks behind the last one named are not built. None: -1.
    layer: int | tuple[int, ...] | None = None
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.num_heads, self.patch_size) < 1 or self.mlp_ratio <= 0:
            raise ValueError("VisionConfig: width, depth, num_heads, patch_size and mlp_ratio must be positive")
        if self.width % self.num_heads:
            raise ValueError(f"VisionConfig: width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.image_size < self.patch_size:
            raise ValueError(f"VisionConfig: image_size {self.image_size} is less than patch_size {self.patch_size}")
        for name, value, known in (
            ("activation", self.activation, ACTIVATIONS),
            ("resample", self.resample, RESAMPLE),
        ):
            if value not in known:
                raise ValueError(f"VisionConfig: {name} {value!r} is not one of {sorted(known)}")
        if not self.layers or not all(0 <= k <= self.depth for k in self.layers):
            raise ValueError(f"VisionConfig: layer {self.layer} is not in {-1 - self.depth}..{self.depth}")
        if self.final_norm and len(self.layers) > 1:
            raise ValueError(f"VisionConfig: final_norm needs one layer, but layer is {self.layer}")
        if self.pool and not (self.final_norm and self.num_blocks == self.depth):
            raise ValueError(f"VisionConfig: pool needs final_norm and the last layer, but layer is {self.layer}")
        if self.post_norm and (self.layer_scale is not None or self.rms_norm):
            raise ValueError("VisionConfig: post_norm has neither layer_scale nor rms_norm")

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states to return, counted from the front: 0 is the embeddings."""
        if self.layer is None:
            return (self.depth,)
        named = (self.layer,) if isinstance(self.layer, int) else self.layer
        return tuple(k if k >= 0 else self.depth + 1 + k for k in named)

    @property
    def num_blocks(self) -> int:
        """Blocks that run."""
        return max(self.layers)

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's middle."""
        return round(self.width * self.mlp_ratio)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's weights were read from, and what of it the model does not compute with.

    Args:
        kind: the layout, a model_type.
        raw: config.json.
        prefix: of the tower's names in the checkpoint.
        rest: the checkpoint's tensors that are kept only to be written back, under its names.
        processor: preprocessor_config.json, if there is one.
    """

    kind: str
    raw: Mapping[str, Any]
    prefix: str = ""
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    processor: Mapping[str, Any] | None = None


class Attention(nn.Module):
    """Attend over each image's tokens; q, k and v in one product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.width // config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.width) if config.qk_norm else None
        self.k_norm = RMSNorm(config.width) if config.qk_norm else None
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, watch: Watch | None = None) -> Tensor:
        y, probe = self.observed(x, cu_seqlens, max_seqlen)
        if watch is not None:
            watch.probe = probe
        return y

    def observed(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, key_bias: Tensor | None = None
    ) -> tuple[Tensor, Probe]:
        """Attend, and let see by what: the flash attention's own queries, keys and log-sum-exp.

        Args:
            x: (T, D).
            cu_seqlens: (S + 1,) int32.
            max_seqlen: of the longest image.
            key_bias: (T,) fp32 added to the scores of each key, e.g. the log-size of a merged token.
        """
        q, k, v = self.qkv(x).chunk(3, -1)  # (T, D) each
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)) for part in (q, k, v))
        y, lse = attention(
            q, k, v, cu_seqlens, max_seqlen_q=max_seqlen, causal=False, key_bias=key_bias, return_lse=True
        )
        probe = Probe(
            q=q.detach(), k=k.detach(), lse=lse, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, key_bias=key_bias
        )
        return self.proj(y.reshape(x.shape)), probe


class Block(nn.Module):
    """One pre-norm block; its last add is left to the next norm, which does both in one pass."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        norm = RMSNorm if config.rms_norm else LayerNorm
        self.norm1 = norm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = norm(config.width, config.norm_eps)
        self.mlp = GeluMLP(config.width, config.mlp_width, config.activation)
        scale = config.layer_scale
        self.scale1 = None if scale is None else nn.Parameter(torch.full((config.width,), float(scale)))
        self.scale2 = None if scale is None else nn.Parameter(torch.full((config.width,), float(scale)))

    def forward(
        self, x: Tensor, branch: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor, max_seqlen: int,
        watch: Watch | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Run the block on x + scale * branch; return its residual stream, last branch and scale, not yet added.

        Its attention is left in `watch`.
        """
        if branch is None:
            y = self.norm1(x)
        else:
            y, x = self.norm1.add(branch, x, scale)
        y, x = self.norm2.add(self.attn(y, cu_seqlens, max_seqlen, watch), x, self.scale1)
        return x, self.mlp(y), self.scale2

    def merge(
        self, x: Tensor, branch: Tensor | None, scale: Tensor | None, merger: Merger, merges: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `forward`, merging tokens between attention and MLP."""
        x = _settle(x, branch, scale)
        y, probe = self.attn.observed(self.norm1(x), merger.cu_seqlens, max(merger.seqlens), merger.log_size)
        x = _settle(x, y, self.scale1)
        if any(merges):
            x = merger.merge(x, probe.keys(), merges)
        return x, self.mlp(self.norm2(x)), self.scale2


class PostNormBlock(nn.Module):
    """One block with its norms on the branches: x + norm(f(x)), as in CogVLM's EVA2-CLIP-E (arXiv 2311.03079)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.mlp = GeluMLP(config.width, config.mlp_width, config.activation)
        self.norm2 = LayerNorm(config.width, config.norm_eps)

    def forward(
        self, x: Tensor, branch: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor, max_seqlen: int,
        watch: Watch | None = None,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        """As `Block.forward`."""
        x = _settle(x, branch, scale)
        x = x + self.norm1(self.attn(x, cu_seqlens, max_seqlen, watch))
        return x, self.norm2(self.mlp(x)), None


def _settle(x: Tensor, branch: Tensor | None, scale: Tensor | None) -> Tensor:
    if branch is None:
        return x
    return x + branch if scale is None else torch.addcmul(x, branch, scale)


class VisionTransformer(Encoder):
    """Encode images into patch tokens.

    Args:
        config: sizes, variants, pixel normalisation, and the layers to return.

    Equal to transformers' CLIPVisionModel, SiglipVisionModel, Siglip2VisionModel, Dinov2Model, InternVLVisionModel,
    Blip2VisionModel and Idefics' vision tower for the same weights: `last_hidden_state` with the family's `final_norm`
    and no `layer`, `hidden_states[layer]` with `layer` and without `final_norm`.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.source: Source | None = None
        self.width, self.stride = config.width * len(config.layers), config.patch_size
        self.patch_embed = PatchEmbed(
            config.patch_size,
            config.width,
            bias=config.patch_bias,
            grid=config.image_size // config.patch_size,
            mean=config.pixel_mean,
            std=config.pixel_std,
            **RESAMPLE[config.resample],
        )
        self.cls_token = nn.Parameter(torch.zeros(config.width)) if config.cls_token else None
        self.cls_position = nn.Parameter(torch.zeros(config.width)) if config.cls_token else None
        self.pre_norm = LayerNorm(config.width, config.norm_eps) if config.pre_norm else None
        block = PostNormBlock if config.post_norm else Block
        self.blocks = nn.ModuleList([block(config) for _ in range(config.num_blocks)])
        self.norm = LayerNorm(config.width, config.norm_eps) if config.final_norm else None
        self.head = (
            AttentionPool(config.width, config.num_heads, config.mlp_width, config.activation, config.norm_eps)
            if config.pool
            else None
        )
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
            (I, (H / P) * (W / P), D), row-major, without the class token; D is `width` of the encoder.

        Raises:
            ValueError: a size that does not fit the patches, or one that the positions are not resampled to.
        """
        tokens = self.forward_tokens(pixels)
        return tokens if self.cls_token is None else tokens[:, 1:]

    def forward_tokens(self, pixels: Tensor) -> Tensor:
        """Encode images; return (I, S, D) with the class token, if there is one, in front."""
        x, cu_seqlens, length = self._embed(pixels, None, "hwc")
        return self._encode(x, cu_seqlens, length).view(pixels.shape[0], length, self.width)

    def forward_packed(
        self,
        pixels: Tensor | Sequence[Tensor],
        grids: Sequence[Sequence[int]] | None = None,
        layout: str = "hwc",
        class_token: bool = False,
    ) -> Tensor:
        """Encode images of different sizes in one call.

        Args:
            pixels: list of images (H, W, 3), uint8 or float in 0..1, or a flat buffer of them with their grids; or
                (M, P * P * 3) patches in (row, column, channel) order, already normalised, with their grids.
            grids: (h, w) or (1, h, w) patches of each image that is not in a list, on the host.
            layout: "hwc" or "chw", of each image.
            class_token: keep it in front of each image, where the encoder has one.

        Returns:
            (N, D), N the patches of all images, row-major: `h * w` rows an image, one more with its class token.

        Raises:
            ValueError: as `forward`.
        """
        x, cu_seqlens, longest = self._embed(pixels, grids, layout)
        y = self._encode(x, cu_seqlens, longest)
        if self.cls_token is None or class_token:
            return y
        patches = _patch_rows([h * w for h, w in self._sizes(pixels, grids, layout)], 1, y.device)
        return y if patches is None else y.index_select(0, patches)

    def encode(
        self, pixels: Tensor | Sequence[Tensor], grids: Sequence[Sequence[int]] | None = None, layout: str = "hwc", *,
        probe_layer: int | None = None, merge: Budget | None = None,
    ) -> tuple[Tokens, Probe | None]:  # fmt: skip
        """Encode images for a compressor: the tokens, and what it may judge them by; or merge inside of the encoder.

        Args:
            pixels: (I, H, W, 3), or as `forward_packed`.
            grids: as `forward_packed`.
            layout: as `forward_packed`.
            probe_layer: block whose attention is wanted, -1 the model's last one: it runs with flash as always.
            merge: tokens that are left of each image behind the last block (number, fraction, or one an image).

        Returns:
            The tokens without class token, of N rows, and the probe of that layer, or None.

        Raises:
            ValueError: a block that does not run, merging with several layers or post-norm blocks, or a budget that
                does not fit.
        """
        dense = isinstance(pixels, Tensor) and grids is None
        x, cu_seqlens, longest = self._embed(pixels, grids, layout)
        sizes = self._sizes(pixels[:1] if dense else pixels, grids, layout) * (len(pixels) if dense else 1)
        plain = Tokens.of(x.new_empty(sum(h * w for h, w in sizes), 0), sizes)
        lead = int(self.cls_token is not None)
        if merge is not None:
            return self._merged(x, cu_seqlens, plain, merge, lead, probe_layer), None
        block = None
        if probe_layer is not None:
            block = probe_layer + self.config.depth if probe_layer < 0 else probe_layer
            if not 0 <= block < len(self.blocks):
                raise ValueError(
                    f"VisionTransformer: the attention of layer {probe_layer} does not run, {len(self.blocks)} of "
                    f"{self.config.depth} blocks do"
                )
        watch = Watch()
        y = self._encode(x, cu_seqlens, longest, block, watch)
        patches = _patch_rows(plain.seqlens, lead, y.device)
        tokens = plain.with_x(y if patches is None else y.index_select(0, patches))
        return tokens, None if watch.probe is None else replace(watch.probe, columns=patches, cls_token=bool(lead))

    def _merged(
        self, x: Tensor, cu_seqlens: Tensor, plain: Tokens, merge: Budget, lead: int, probe_layer: int | None
    ) -> Tokens:
        if self.config.post_norm or len(self.config.layers) > 1 or probe_layer is not None:
            raise ValueError(
                "VisionTransformer: tokens merge in pre-norm blocks, for one layer, and without a probe of attention"
            )
        seqlens = tuple(n + lead for n in plain.seqlens)
        budgets = [k + lead for k in tokens_to_keep("VisionTransformer", merge, plain.seqlens)]
        merger = Merger(seqlens, cu_seqlens, protected=lead)
        x = x if self.pre_norm is None else self.pre_norm(x)
        branch = scale = None
        for block, merges in zip(self.blocks, merge_schedule(seqlens, budgets, len(self.blocks), lead), strict=True):
            assert isinstance(block, Block)  # post_norm is refused above
            x, branch, scale = block.merge(x, branch, scale, merger, merges)
        y = _settle(x, branch, scale) if self.norm is None else self.norm(_settle(x, branch, scale))
        pos = boundaries(seqlens, x.device)[1][:, None] - lead
        merged = merger.tokens(y, pos)
        kept = tuple(n - lead for n in merger.seqlens)
        patches = _patch_rows(kept, lead, x.device)
        return merged if patches is None else take(merged, patches, kept)[0]

    def forward_pooled(
        self, pixels: Tensor | Sequence[Tensor], grids: Sequence[Sequence[int]] | None = None, layout: str = "hwc"
    ) -> Tensor:
        """Encode images, (I, H, W, 3) or as `forward_packed`, into one vector each, (I, D), by the pooling head."""
        if self.head is None:
            raise ValueError("VisionTransformer: no pooling head; build it with VisionConfig(pool=True)")
        x, cu_seqlens, longest = self._embed(pixels, grids, layout)
        return self.head(self._encode(x, cu_seqlens, longest), cu_seqlens, longest)

    def _sizes(
        self, pixels: Tensor | Sequence[Tensor], grids: Sequence[Sequence[int]] | None, layout: str
    ) -> list[tuple[int, int]]:
        """Return (h, w) in patches of each image."""
        if grids is not None:
            return [(grid[-2], grid[-1]) for grid in grids for _ in range(grid[0] if len(grid) == 3 else 1)]
        p, axes = self.config.patch_size, (slice(-2, None) if layout == "chw" else slice(-3, -1))
        return [(h // p, w // p) for h, w in (image.shape[axes] for image in pixels)]

    def _embed(
        self, pixels: Tensor | Sequence[Tensor], grids: Sequence[Sequence[int]] | None, layout: str
    ) -> tuple[Tensor, Tensor, int]:
        """Return packed embeddings (T, D), their boundaries (I + 1,) int32, and the longest image."""
        prefix = None
        if self.cls_token is not None and self.cls_position is not None:
            prefix = (self.cls_token + self.cls_position)[None]
        dense = isinstance(pixels, Tensor) and grids is None
        if isinstance(pixels, Tensor) and dense and pixels.dim() != 4:
            raise ValueError(f"VisionTransformer: pixels {tuple(pixels.shape)} need their grids, or be (I, H, W, 3)")
        sizes = self._sizes(pixels[:1] if dense else pixels, grids, layout)
        native = self.config.image_size // self.config.patch_size
        if self.config.resample == "none" and any(size != (native, native) for size in sizes):
            raise ValueError(
                f"VisionTransformer: positions are not resampled here: images must be {self.config.image_size} x "
                f"{self.config.image_size} pixels ({native} x {native} patches), but got {sizes[:8]} patches"
            )
        if isinstance(pixels, Tensor) and dense:
            x = self.patch_embed(pixels, layout, prefix)  # (I, S, D)
            count, longest, _ = x.shape
            cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=x.device) * longest
            return x.flatten(0, 1), cu_seqlens, longest
        x, cu_seqlens = self.patch_embed.forward_packed(pixels, grids, layout, prefix=prefix)
        return x, cu_seqlens, max((h * w for h, w in sizes), default=0) + (prefix is not None)

    def _encode(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, probed: int | None = None,
        watch: Watch | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the blocks on packed embeddings (T, D); return the wanted hidden states (T, D * layers).

        The attention of block `probed` is left in `watch`.
        """
        wanted = self.config.layers
        x = x if self.pre_norm is None else self.pre_norm(x)
        branch = scale = None
        kept: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            if index in wanted:
                x, branch, scale = _settle(x, branch, scale), None, None
                kept[index] = x
            x, branch, scale = block(x, branch, scale, cu_seqlens, max_seqlen, watch if index == probed else None)
        if self.norm is not None:
            return self.norm(x) if branch is None else self.norm.add(branch, x, scale)[0]
        kept[len(self.blocks)] = _settle(x, branch, scale)
        return kept[wanted[0]] if len(wanted) == 1 else torch.cat([kept[index] for index in wanted], -1)


def _patch_rows(seqlens: Sequence[int], lead: int, device: torch.device) -> Tensor | None:
    """Return the rows of the patches (N,) int64 where `lead` rows stand in front of each image's; None without."""
    if not lead:
        return None
    index = torch.arange(sum(seqlens)) + lead * (1 + segments(seqlens, torch.device("cpu")))
    return index.to(device, non_blocking=True)
