"""Patch embedding: a convolution whose stride is its kernel is a matrix product over patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastmllm.hf.fusion import Fusion, outside_autocast
from fastmllm.kernels.patch_embed import patch_embed, patch_weight


class PatchConv(Fusion):
    """nn.Conv2d and nn.Conv3d with stride = kernel; the parameter keeps its shape, so checkpoints do too."""

    op = "patch_embed"
    one_tensor = True

    @staticmethod
    def refuses(module: Any) -> str | None:
        assert isinstance(module, (nn.Conv2d, nn.Conv3d))
        padded = module.padding != "valid" and (isinstance(module.padding, str) or any(module.padding))
        if padded or set(module.dilation) != {1} or module.groups != 1 or module.transposed:
            return "it has padding, dilation or groups"
        if isinstance(module, nn.Conv2d) and len(set(module.kernel_size)) != 1:
            return f"its patches are {module.kernel_size}, not square"
        return None

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        # the product takes a 3rd to a 5th of conv3d's time, and of conv2d's 0.4 to 0.8 in bf16, but 1.2 to 1.8 in fp32
        if device.type == "cpu" and isinstance(module, nn.Conv2d) and dtype != torch.bfloat16:
            return "oneDNN's conv2d beats cutting patches in fp32"
        return None

    @staticmethod
    def unsupported(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
        kernel = module.kernel_size
        if x.dim() != len(kernel) + 2 or any(n < k for n, k in zip(x.shape[2:], kernel, strict=True)):
            return f"pixels {tuple(x.shape)} hold no {kernel} patch"
        if not len(x):
            return "there is no image"
        if len(kernel) == 3 and x.shape[2:] != torch.Size(kernel):
            return f"pixels {tuple(x.shape)} are frames, not patches that a processor has cut"
        if x.dtype != module.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return f"pixels are {x.dtype}, its weight {module.weight.dtype}"
        return None

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], x: Tensor) -> Tensor:
        kernel = module.kernel_size
        return outside_autocast(_patches, x, module.weight, module.bias, kernel=kernel)


def _patches(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: tuple[int, ...]) -> Tensor:
    if x.shape[2:] == torch.Size(kernel):  # Qwen's processor cuts the patches
        y = linear(x.reshape(len(x), -1), weight.flatten(1), bias)
        return y.view(*y.shape, *(1,) * len(kernel))
    grid = [n // k for n, k in zip(x.shape[2:], kernel, strict=True)]
    x = x[:, :, : grid[0] * kernel[0], : grid[1] * kernel[1]]  # SigLIP 384 with patches of 14 leaves a rest
    if x.device.type == "cpu":  # one product with the weight as it lies: turning it costs more than one image's product
        cut = x.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1)).permute(0, 2, 4, 1, 3, 5)  # (B, H, W, C, k, k)
        return linear(cut.flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)
    y = patch_embed(x, patch_weight(weight), bias, patch_size=kernel[0], layout="chw")  # (B, N, D)
    return y.transpose(1, 2).unflatten(2, grid)
