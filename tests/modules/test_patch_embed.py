"""The patch embedding module against a convolution, and its position table against Dinov2's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.modules.patch_embed import PatchEmbed, conv_to_patch_weight, patch_to_conv_weight

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


def test_position_is_resampled_and_differentiable() -> None:
    """As transformers' Dinov2Embeddings.interpolate_pos_encoding: bicubic, corners not aligned, in fp32."""
    module = PatchEmbed(2, 4, grid=3)
    x = pixels(1, 4, 10, 3)
    table = module.position.detach().reshape(1, 3, 3, 4).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=(2, 5), mode="bicubic").permute(0, 2, 3, 1).reshape(10, 4)
    got = module(x)
    module.position.requires_grad_(False).zero_()
    torch.testing.assert_close(got - module(x), expected[None])
    got.sum().backward()
    assert module.weight.grad is not None
    module.position.requires_grad_(True)
    module(x).sum().backward()
    assert module.position.grad is not None


def test_layouts_and_packed_images_agree() -> None:
    torch.manual_seed(0)
    module = PatchEmbed(2, 8, grid=4, mean=MEAN, std=STD, mode="bilinear", align_corners=True)
    images = [pixels(4, 8, 3), pixels(6, 2, 3)]
    got, cu_seqlens = module.forward_packed(images)
    assert cu_seqlens.tolist() == [0, 8, 11]
    for x, part in zip(images, got.split([8, 3]), strict=True):
        torch.testing.assert_close(part, module(x[None])[0])
        torch.testing.assert_close(part, module(x.movedim(-1, 0)[None], layout="chw")[0])


def test_a_still_image_is_equal_frames() -> None:
    torch.manual_seed(0)
    module = PatchEmbed(2, 8, temporal_patch_size=2)
    x = pixels(4, 8, 3)
    twice, _ = module.forward_packed([x.expand(2, -1, -1, -1)], merge_size=2)
    once, _ = module.forward_packed([x], merge_size=2, still=True)
    torch.testing.assert_close(once, twice)
    torch.testing.assert_close(module(x[None])[0], module.forward_packed([x], still=True)[0])
    weight = torch.randn(8, 3, 2, 2, 2)
    module.load_conv_weight(weight)
    assert torch.equal(module.conv_weight(), weight)


def test_a_prefix_stands_before_each_image_and_cut_patches_are_images() -> None:
    torch.manual_seed(0)
    module = PatchEmbed(2, 8, grid=4, mean=MEAN, std=STD)
    prefix = torch.randn(1, 8, requires_grad=True)
    images = [pixels(4, 8, 3), pixels(6, 2, 3)]
    got, cu_seqlens = module.forward_packed(images, prefix=prefix)
    assert cu_seqlens.tolist() == [0, 9, 13]
    for x, part in zip(images, got.split([9, 4]), strict=True):
        assert torch.equal(part[:1], prefix)
        torch.testing.assert_close(part[1:], module(x[None])[0])
        torch.testing.assert_close(part, module(x[None], prefix=prefix)[0])
    normed = [((x.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).float() for x in images]
    cut = [x.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).transpose(1, 2).reshape(-1, 12) for x in normed]
    again, _ = module.forward_packed(torch.cat(cut), [(2, 4), (3, 1)], prefix=prefix)
    torch.testing.assert_close(again, got)
    again.sum().backward()
    assert torch.equal(prefix.grad, torch.full((1, 8), 2.0))


def test_rejects_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        PatchEmbed(4, 8)(pixels(1, 6, 8, 3))
    with pytest.raises(ValueError, match="3 values"):
        PatchEmbed(4, 8, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="mean and std"):
        PatchEmbed(4, 8, mean=MEAN)
    with pytest.raises(ValueError, match="patch_size=0"):
        PatchEmbed(0, 8)
    with pytest.raises(ValueError, match="with their grid_thw"):
        PatchEmbed(4, 8).forward_packed(pixels(48))
