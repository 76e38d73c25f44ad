"""Patch convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmllm.hf import patch
from fastmllm.hf.fused.patches import PatchConv


@pytest.mark.parametrize(
    "conv, shape",
    [
        (nn.Conv2d(3, 8, 7, 7), (2, 3, 28, 35)),
        (nn.Conv2d(3, 8, 2, 2, bias=False), (1, 3, 2, 2)),
        (nn.Conv2d(3, 8, 7, 7, padding="valid"), (2, 3, 30, 27)),  # SigLIP 384 with patches of 14 leaves a rest
        (nn.Conv2d(3, 8, 7, 7, padding_mode="reflect"), (1, 3, 14, 7)),
        (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
    ],
)
def test_equals_the_convolution(conv, shape):
    x = torch.randn(shape, requires_grad=True)
    expected = conv(x)
    up = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, [x, *conv.parameters()], up)
    report = patch(conv, ops=["patch_embed"])
    assert report.replaced
    found = conv(x)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, [x, *conv.parameters()], up), grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not report.fallbacks()


@pytest.mark.parametrize(
    "conv, reason",
    [
        (nn.Conv2d(3, 8, 7, 7, padding=1), "padding"),
        (nn.Conv2d(3, 8, 7, 1, padding="same"), "padding"),
        (nn.Conv2d(4, 8, 7, 7, groups=2), "groups"),
        (nn.Conv2d(3, 8, (7, 14), (7, 14)), "not square"),
    ],
)
def test_another_convolution_is_left(conv, reason):
    assert reason in PatchConv.refuses(conv)


@pytest.mark.parametrize(
    "conv, shape", [(nn.Conv2d(3, 8, 7, 7), (3, 28, 28)), (nn.Conv3d(3, 8, 2, 2), (1, 3, 4, 4, 4))]
)
def test_pixels_that_are_no_patches_run_torch(conv, shape):
    x = torch.randn(shape)
    expected = conv(x)
    report = patch(conv, ops=["patch_embed"])
    assert torch.equal(conv(x), expected)
    assert sum(report.fallbacks()[""].values()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_has_torchs_dtype_and_numbers(dtype):
    conv, x = nn.Conv2d(3, 8, 7, 7), torch.randn(2, 3, 14, 21).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = conv(x)
        report = patch(conv, ops=["patch_embed"])
        found = conv(x)
    assert not report.fallbacks()
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_another_dtype_is_torchs_to_refuse():
    conv = nn.Conv2d(3, 8, 7, 7)
    patch(conv, ops=["patch_embed"])
    with pytest.raises(RuntimeError, match="type"):
        conv(torch.zeros(1, 3, 7, 7, dtype=torch.bfloat16))
