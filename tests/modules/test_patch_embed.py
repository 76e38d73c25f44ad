"""The patch embedding module against a convolution, and its position table against Dinov2's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.modules.patch_embed import PatchEmbed, conv_to_patch_weight, patch_to_conv_weight, resample_position

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_equals_normalised_convolution_with_positions() -> None:
    torch.manual_seed(0)
    module = PatchEmbed(4, 24, grid=3, mean=MEAN, std=STD)
    torch.nn.init.normal_(module.bias)
    x = pixels(2, 12, 12, 3)
    normed = ((x.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).float().permute(0, 3, 1, 2)
    expected = F.conv2d(normed, module.conv_weight(), module.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(x), expected + module.position, rtol=1e-4, atol=1e-5)


def test_without_normalisation_bias_and_positions() -> None:
    torch.manual_seed(0)
    module = PatchEmbed(2, 8, channels=1, bias=False)
    x = pixels(1, 4, 6, 1)
    expected = F.conv2d(x.float().permute(0, 3, 1, 2) / 255, module.conv_weight(), stride=2)
    torch.testing.assert_close(module(x), expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert [name for name, _ in module.named_parameters()] == ["weight"]


def test_conv_weight_round_trip() -> None:
    weight = torch.randn(5, 3, 2, 2)
    flat = conv_to_patch_weight(weight)
    assert flat.shape == (12, 5)
    assert torch.equal(flat[3 * 2 + 1], weight[:, 1, 1, 0])  # row 1, column 0, channel 1
    assert torch.equal(patch_to_conv_weight(flat, 2), weight)
    module = PatchEmbed(2, 5)
    module.load_conv_weight(weight)
    assert torch.equal(module.conv_weight(), weight)


def test_position_is_resampled_in_fp32_and_differentiable() -> None:
    table = torch.randn(9, 4, requires_grad=True)
    assert resample_position(table, 3, 3, 3) is table
    wide = resample_position(table, 3, 2, 5)
    assert wide.shape == (10, 4)
    wide.sum().backward()
    assert table.grad is not None
    half = table.detach().bfloat16()
    expected = resample_position(half.float(), 3, 5, 4).bfloat16()
    assert torch.equal(resample_position(half, 3, 5, 4), expected)


def test_rejects_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        PatchEmbed(4, 8)(pixels(1, 6, 8, 3))
    with pytest.raises(ValueError, match="3 values"):
        PatchEmbed(4, 8, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="mean and std"):
        PatchEmbed(4, 8, mean=MEAN)
    with pytest.raises(ValueError, match="patch_size=0"):
        PatchEmbed(0, 8)
