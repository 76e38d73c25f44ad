"""EfficientNet-Lite as a frozen feature grid (Tan and Le, arXiv 1905.11946; the lite variants have ReLU6 and no SE).

BatchNorm is folded into each convolution, so a loaded network is convolutions with a bias and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.models.encoder import Encoder

BATCH_NORM_EPS = 1e-3  # the TensorFlow checkpoints


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficientNetConfig:
    """Describe an EfficientNet-Lite; the defaults are Lite0."""

    stem_width: int = 32
    # (repeats, kernel, stride, expansion, width out) of each stage
    stages: tuple[tuple[int, int, int, int, int], ...] = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    head_width: int = 1280
    features: str = "head"  # head: after the 1x1 head convolution; trunk: the last stage's output before it
    pixel_mean: tuple[float, float, float] = (127 / 255,) * 3
    pixel_std: tuple[float, float, float] = (128 / 255,) * 3

    def __post_init__(self) -> None:
        if self.features not in ("head", "trunk"):
            raise ValueError(f"EfficientNetConfig: features must be 'head' or 'trunk', got {self.features!r}")
        if not self.stages or any(len(stage) != 5 or min(stage) < 1 for stage in self.stages):
            raise ValueError("EfficientNetConfig: stages needs (repeats, kernel, stride, expansion, width) >= 1 each")
        if any(stage[1] % 2 == 0 or stage[1] < 3 or stage[2] > 2 for stage in self.stages):
            raise ValueError("EfficientNetConfig: a stage's kernel is odd and at least 3, its stride 1 or 2")

    @property
    def stride(self) -> int:
        """Pixels that a feature covers on a side."""
        total = 2
        for _, _, stride, _, _ in self.stages:
            total *= stride
        return total

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.head_width if self.features == "head" else self.stages[-1][-1]


class ConvSame(nn.Conv2d):
    """Convolve with TensorFlow's "same" padding, which at stride 2 puts the odd row and column at the end."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(width_in, width_out, kernel, stride, groups=groups, bias=True)
        before = (kernel - stride) // 2  # exact where the input is a multiple of the stride
        after = kernel - stride - before
        if before == after:
            self.padding = (before, before)
            self.pad = None
        else:
            self.pad = (before, after, before, after)

    def forward(self, x: Tensor) -> Tensor:
        if self.pad is not None:
            x = F.pad(x, self.pad)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; add the input where shapes allow (MobileNetV2, arXiv 1801.04381)."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width_in * expansion
        self.expand = ConvSame(width_in, inner, 1) if expansion > 1 else None
        self.depthwise = ConvSame(inner, inner, kernel, stride, groups=inner)
        self.project = ConvSame(inner, width_out, 1)
        self.residual = stride == 1 and width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return y.add_(x) if self.residual else y


class EfficientNet(Encoder):
    """Encode images into a feature grid; parameters are the folded convolutions.

    Args:
        config: sizes, pixel normalisation, and which features to return.

    Equal to efficientnet-lite-pytorch's `extract_features` in eval mode for the same weights.
    """

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.stride = config.width, config.stride
        self.stem = ConvSame(3, config.stem_width, 3, 2)
        blocks, width = [], config.stem_width
        for repeats, kernel, stride, expansion, width_out in config.stages:
            for index in range(repeats):
                blocks.append(InvertedResidual(width, width_out, kernel, stride if index == 0 else 1, expansion))
                width = width_out
        self.blocks = nn.ModuleList(blocks)
        self.head = ConvSame(width, config.head_width, 1) if config.features == "head" else None
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack it

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images of one size.

        Args:
            pixels: (I, H, W, 3) uint8, or float in 0..1; H and W multiples of `stride`.

        Returns:
            (I, (H / stride) * (W / stride), width), row-major, in the parameters' dtype.

        Raises:
            ValueError: shape or dtype do not fit.
        """
        if pixels.dim() != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"EfficientNet: pixels must be (I, H, W, 3), got {tuple(pixels.shape)}")
        if pixels.shape[1] % self.stride or pixels.shape[2] % self.stride or 0 in pixels.shape[1:]:
            raise ValueError(
                f"EfficientNet: image {pixels.shape[1]} x {pixels.shape[2]} must be a positive multiple of "
                f"{self.stride} on each side; resize or pad it"
            )
        if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
            raise ValueError(f"EfficientNet: pixels must be uint8 or float in 0..1, got {pixels.dtype}")
        x = F.relu6(self.stem(self._normalise(pixels)), inplace=True)
        for block in self.blocks:
            x = block(x)
        if self.head is not None:
            x = F.relu6(self.head(x), inplace=True)
        return x.flatten(2).transpose(1, 2)  # (I, N, D); a view of channels-last memory

    def _normalise(self, pixels: Tensor) -> Tensor:
        scale = 255.0 if pixels.dtype == torch.uint8 else 1.0
        # one scalar where the channels agree: no small tensor has to reach the device
        mean, std = self.config.pixel_mean, self.config.pixel_std
        x = pixels.permute(0, 3, 1, 2).float()  # (I, 3, H, W), channels-last in memory
        if len(set(mean)) == 1 and len(set(std)) == 1:
            x = (x - mean[0] * scale) * (1 / (std[0] * scale))
        else:
            x = torch.stack([(x[:, c] - mean[c] * scale) * (1 / (std[c] * scale)) for c in range(3)], 1)
        return x.to(self.stem.weight.dtype, memory_format=torch.channels_last)


def fold_batch_norm(
    weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float = BATCH_NORM_EPS
) -> tuple[Tensor, Tensor]:
    """Fold a frozen BatchNorm into the bias-free convolution in front of it.

    Args:
        weight: (D, C, k, k) of the convolution.
        gamma, beta, mean, variance: (D,) of the BatchNorm.
        eps: added to the variance.

    Returns:
        (D, C, k, k) weight and (D,) bias, folded in fp64 and rounded to the dtype of `weight`.
    """
    scale = gamma.double() / torch.sqrt(variance.double() + eps)
    bias = beta.double() - mean.double() * scale
    return (weight.double() * scale[:, None, None, None]).to(weight.dtype), bias.to(weight.dtype)


def convert_lite_state(state: Mapping[str, Tensor], config: EfficientNetConfig) -> dict[str, Tensor]:
    """Map an efficientnet-lite-pytorch state dict onto `EfficientNet`, BatchNorms folded.

    Args:
        state: names `_conv_stem.weight`, `_blocks.0._depthwise_conv.weight`, ...; the classifier is ignored.
        config: which network.

    Returns:
        State dict for `EfficientNet(config)`.

    Raises:
        ValueError: a tensor is missing.
    """
    pairs = [("stem", "_conv_stem", "_bn0")]
    index = 0
    for repeats, _, _, expansion, _ in config.stages:
        for _ in range(repeats):
            ours, theirs = f"blocks.{index}", f"_blocks.{index}"
            if expansion > 1:
                pairs.append((f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"))
            pairs.append((f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"))
            pairs.append((f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2"))
            index += 1
    if config.features == "head":
        pairs.append(("head", "_conv_head", "_bn1"))
    folded: dict[str, Tensor] = {}
    for ours, convolution, norm in pairs:
        names = [f"{convolution}.weight"]
        names += [f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"convert_lite_state: the checkpoint lacks {missing}; is it an EfficientNet-Lite0?")
        weight, gamma, beta, mean, variance = (state[name] for name in names)
        folded[f"{ours}.weight"], folded[f"{ours}.bias"] = fold_batch_norm(weight, gamma, beta, mean, variance)
    return folded
