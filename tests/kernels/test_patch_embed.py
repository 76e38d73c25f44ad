"""patch_embed: the operator equals normalise + convolution, Triton and native code equal it, autograd holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import _native
from fastmllm.kernels import patch_embed as op
from fastmllm.kernels.patch_embed import patch_embed

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# I, H, W, P, D
SCALE, SHIFT = [0.015, 0.014, 0.013], [-1.9, -1.8, -1.4]
SHAPES = [(2, 28, 42, 14, 33), (1, 32, 16, 16, 40), (3, 4, 6, 2, 5)]


def _inputs(shape, dtype, uint8, device="cpu", channels=3):
    torch.manual_seed(0)
    images, height, width, patch, dim = shape
    pixels = torch.randint(0, 256, (images, height, width, channels), dtype=torch.uint8)
    k, n = patch * patch * channels, (height // patch) * (width // patch)
    weight, bias, position = torch.randn(k, dim) / k**0.5, torch.randn(dim), torch.randn(n, dim)
    pixels = pixels if uint8 else (pixels / 255).to(dtype)
    return [pixels.to(device), *(t.to(device, dtype) for t in (weight, bias, position))]


def _torch(pixels, weight, bias, position, patch, mean=MEAN, std=STD):
    """Image processor + patch convolution + positions, as vision transformers do it."""
    channels, dim = pixels.shape[-1], weight.shape[1]
    if pixels.dtype == torch.uint8:
        pixels = pixels.to(weight.dtype) / 255
    x = (pixels - torch.tensor(mean, dtype=weight.dtype)) / torch.tensor(std, dtype=weight.dtype)
    kernel = weight.view(patch, patch, channels, dim).permute(3, 2, 0, 1)
    out = F.conv2d(x.permute(0, 3, 1, 2), kernel, bias, stride=patch)
    return out.flatten(2).transpose(1, 2) + position


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uint8", [True, False])
def test_matches_torch(shape, dtype, uint8):
    inputs, patch = _inputs(shape, dtype, uint8), shape[3]
    pixels, *parameters = [strided(t) for t in inputs]
    leaves = [t.requires_grad_() for t in ([] if uint8 else [pixels]) + parameters]
    out = patch_embed(pixels, *parameters, mean=MEAN, std=STD, patch_size=patch)
    wide = [t if t.dtype == torch.uint8 else t.double() for t in inputs]
    assert out.dtype == dtype
    assert_as_accurate(out, _torch(*inputs, patch), _torch(*wide, patch), ulps=8)
    seed = torch.randn(out.shape).to(dtype)
    got = gradients([out], leaves, [seed])
    for a, s, o in zip(got, _torch_gradients(inputs, seed, patch), _torch_gradients(wide, seed, patch), strict=True):
        assert_as_accurate(a, s, o, ulps=16)


@pytest.mark.parametrize("shape", [(0, 8, 8, 4, 16), (2, 0, 8, 4, 16)])
@pytest.mark.parametrize("uint8", [True, False])
def test_empty(shape, uint8):
    pixels, *parameters = _inputs(shape, torch.float32, uint8)
    leaves = [t.requires_grad_() for t in parameters]
    out = patch_embed(pixels, *leaves, mean=MEAN, std=STD, patch_size=4)
    assert out.shape == (shape[0], len(leaves[2]), 16)
    for t, g in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        torch.testing.assert_close(g, torch.zeros_like(t))


TRITON = [(2, 12, 18, 6, 33), (1, 16, 16, 8, 40), (2, 12, 14, 2, 5), (1, 6, 6, 6, 70), (0, 8, 8, 4, 16)]


@pytest.mark.parametrize("shape", TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uint8", [True, False])
def test_triton_matches_reference(shape, dtype, uint8, device, guard):
    pixels, w, b, p = _inputs(shape, dtype, uint8, device)
    wide = [pixels if uint8 else pixels.double(), w.double(), b.double(), p.double()]
    last = (shape[3], SCALE, SHIFT) if uint8 else (shape[3], [0.5, 2.0, 3.0], [0.0, 0.5, 1.0])
    got = guard.run(op.patch_embed_triton, pixels, w, b.float(), p, *last)
    want = op.patch_embed_reference(pixels, w, b, p, *last)
    assert_as_accurate(got, want, op.patch_embed_reference(*wide, *last))
    plain = (shape[3], [1.0] * 3, [0.0] * 3)
    got = guard.run(op.patch_embed_triton, pixels, w, None, None, *plain)
    want = op.patch_embed_reference(pixels, w, None, None, *plain)
    assert_as_accurate(got, want, op.patch_embed_reference(*wide[:2], None, None, *plain))
    grad, patch = torch.randn(want.shape).to(device, dtype), shape[3]
    got = guard.run(op.patch_embed_bwd_triton, grad, pixels, w, patch, not uint8, True, *last[1:])
    want = op.patch_embed_bwd_reference(grad, pixels, w, patch, not uint8, True, *last[1:])
    wide = op.patch_embed_bwd_reference(grad.double(), *wide[:2], patch, not uint8, True, *last[1:])
    for g, s, o in zip(got, want, wide, strict=True):
        assert_as_accurate(g, s, o)


def test_triton_backward_of_a_stride_0_gradient(device):
    """`.sum().backward()` hands the backward an expanded scalar."""
    pixels, w, _, _ = _inputs((2, 4, 6, 2, 5), torch.float32, False, device)
    grad = torch.ones((), device=device).expand(2, 6, 5)
    got = op.patch_embed_bwd_triton(grad, pixels, w, 2, True, True, SCALE, SHIFT)
    want = op.patch_embed_bwd_reference(grad.contiguous(), pixels, w, 2, True, True, SCALE, SHIFT)
    for g, s in zip(got, want, strict=True):
        torch.testing.assert_close(g, s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("uint8", [True, False])
@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True), (False, False)])
def test_native_matches_reference(dtype, uint8, parts):
    if _native.EXTENSION_MISSING:
        pytest.skip(f"the C++ operators are {_native.EXTENSION_MISSING}")
    scale, shift = (SCALE, SHIFT) if uint8 else ([0.5, 2.0, 3.0], [0.0, 0.5, 1.0])
    for shape in [*SHAPES, (0, 8, 8, 4, 16), (2, 0, 8, 4, 16), (2, 70, 70, 14, 80)]:  # the last one through oneDNN
        pixels, w, b, p = _inputs(shape, dtype, uint8)
        b = None if not parts[0] else b if dtype == torch.float64 else b.float()
        args = (strided(pixels), strided(w), b, strided(p) if parts[1] else None, shape[3])
        got = torch.ops.fastmllm.patch_embed(*args, scale, shift)
        assert got.dtype == dtype
        assert got.is_contiguous()
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
        want = op.patch_embed_reference(*wide, scale, shift)
        assert_as_accurate(got, op.patch_embed_reference(*args, scale, shift), want, ulps=2)
        if not parts[0] or not parts[1]:
            continue
        grad, flags = torch.randn(got.shape).to(dtype), (shape[3], not uint8, True)
        got = torch.ops.fastmllm.patch_embed_bwd(grad, *args[:2], *flags, scale=scale, shift=shift)
        same = op.patch_embed_bwd_reference(grad, *args[:2], *flags, scale, shift)
        want = op.patch_embed_bwd_reference(grad.double(), *wide[:2], *flags, scale, shift)
        for g, s, o in zip(got, same, want, strict=True):
            assert g.dtype == s.dtype
            assert_as_accurate(g, s, o, ulps=2)


def _torch_gradients(inputs, seed, patch):
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    return gradients([_torch(*leaves, patch)], [t for t in leaves if t.requires_grad], [seed])


@pytest.mark.parametrize("uint8", [True, False])
@pytest.mark.parametrize("mean, std", [(None, None), ((0.5,), None), (None, (0.5,))])
def test_normalisation_is_optional(uint8, mean, std):
    pixels, w, _, _ = _inputs((2, 8, 4, 4, 6), torch.float64, uint8, channels=1)
    got = patch_embed(pixels, w, mean=mean, std=std, patch_size=4)
    want = _torch(pixels, w, None, torch.zeros(()), 4, mean or (0.0,), std or (1.0,))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("uint8", [True, False])
def test_opcheck(uint8):
    pixels, *rest = _inputs((2, 8, 4, 4, 6), torch.float32, uint8)
    inputs = [pixels if uint8 else pixels.requires_grad_(), *(t.requires_grad_() for t in rest)]
    torch.library.opcheck(torch.ops.fastmllm.patch_embed.default, (*inputs, 4, SCALE, SHIFT))
    torch.library.opcheck(torch.ops.fastmllm.patch_embed.default, (*inputs[:2], None, None, 4, SCALE, SHIFT))


@pytest.mark.parametrize("uint8", [True, False])
def test_compile(uint8):
    inputs = _inputs((2, 8, 4, 4, 6), torch.float32, uint8)
    inputs[1].requires_grad_()
    compiled = torch.compile(patch_embed, fullgraph=True, backend="aot_eager")
    got = compiled(*inputs, mean=MEAN, std=STD, patch_size=4)
    torch.testing.assert_close(got, patch_embed(*inputs, mean=MEAN, std=STD, patch_size=4))
    got.sum().backward()
    assert inputs[1].grad is not None


@pytest.mark.parametrize("uint8", [True, False])
def test_gradcheck(uint8):
    pixels, *rest = _inputs((2, 4, 4, 2, 3), torch.float64, uint8)
    leaves = [pixels if uint8 else pixels.requires_grad_(), *(t.requires_grad_() for t in rest)]
    assert torch.autograd.gradcheck(lambda *a: patch_embed(*a, mean=MEAN, std=STD, patch_size=2), leaves)
    assert torch.autograd.gradcheck(lambda *a: patch_embed(*a, patch_size=2), leaves[:2])


def test_frozen_weights_cost_no_gradient():
    pixels, w, b, p = _inputs((2, 8, 4, 4, 6), torch.float32, False)
    patch_embed(pixels.requires_grad_(), w, b, p, patch_size=4).sum().backward()
    assert pixels.grad is not None
    grad = torch.ones(2, 2, 6)
    dx, dw = torch.ops.fastmllm.patch_embed_bwd(grad, pixels.detach(), w, 4, False, False, scale=SCALE, shift=SHIFT)
    assert dx.numel() == dw.numel() == 0


def test_rejects_what_does_not_fit():
    pixels, w = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(48, 6)
    with pytest.raises(ValueError, match=r"patch_embed: pixels \(1, 8, 9, 3\).*whole number of 4 x 4 patches"):
        patch_embed(torch.zeros(1, 8, 9, 3), w, patch_size=4)
    with pytest.raises(ValueError, match=r"patch_embed: weight \(47, 6\).*4 \* 4 \* 3 rows"):
        patch_embed(pixels, torch.zeros(47, 6), patch_size=4)
    with pytest.raises(ValueError, match=r"patch_embed: pixels must be \(I, H, W, C\)"):
        patch_embed(pixels[0], w, patch_size=4)
    with pytest.raises(ValueError, match=r"patch_embed: bias \(5,\)"):
        patch_embed(pixels, w, torch.zeros(5), patch_size=4)
    with pytest.raises(ValueError, match=r"patch_embed: position \(3, 6\) must be \(4, 6\)"):
        patch_embed(pixels, w, None, torch.zeros(3, 6), patch_size=4)
    with pytest.raises(ValueError, match="patch_embed: mean has 1 values"):
        patch_embed(pixels, w, mean=(0.5,), patch_size=4)
    with pytest.raises(ValueError, match="uint8 or float"):
        patch_embed(pixels.int(), w, patch_size=4)
