"""patch_embed: images without patches, a norm in front, and bits that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import gradients
from patch_inputs import MEAN, SCALE, SHIFT, STD, inputs, packed_inputs

from fastmllm.kernels import patch_embed as op
from fastmllm.kernels.patch_embed import patch_embed, patch_embed_packed


def test_a_norm_in_front():
    """The tokens, prefix and all, through a LayerNorm; its weights get gradients."""
    pixels, *parameters = inputs((2, 6, 8, 2, 5), torch.float32, True)
    prefix, weight, bias = torch.randn(3, 5), torch.randn(5), torch.randn(5)
    leaves = [t.requires_grad_() for t in (*parameters, prefix, weight, bias)]
    options = {"mean": MEAN, "std": STD, "patch_size": 2, "prefix": prefix}
    plain = patch_embed(pixels, *parameters, **options)
    want = F.layer_norm(plain, (5,), weight, bias, 1e-3)
    got = patch_embed(pixels, *parameters, **options, norm_weight=weight, norm_bias=bias, norm_eps=1e-3)
    torch.testing.assert_close(got, want)
    seed = torch.randn(got.shape)
    for g, w in zip(gradients([got], leaves, [seed]), gradients([want], leaves, [seed]), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    position = parameters[2].repeat(2, 1)
    for packed in (list(pixels), pixels.flatten()):
        grids = None if isinstance(packed, list) else [(3, 4), (3, 4)]
        tokens, _ = patch_embed_packed(packed, *parameters[:2], position, **options, grid_thw=grids, norm_weight=weight,
                                       norm_bias=bias, norm_eps=1e-3)  # fmt: skip
        torch.testing.assert_close(tokens.view(got.shape), got)
    with pytest.raises(ValueError, match=r"norm_bias \(5,\) needs a norm_weight"):
        patch_embed(pixels, *parameters, **options, norm_bias=bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_batch_does_not_change_the_sums(dtype):
    """The tile depends on the rows of the batch, but not how one value is summed up."""
    for cols in (8, 588, 1024, 4096):
        configs = [op._config(rows, cols, dtype) for rows in (1, 576, 5000, 10**6)]
        assert len({config["BLOCK_K"] for config in configs}) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_an_image_has_the_same_bits_alone_and_in_a_batch(packed, device, monkeypatch):
    """With the tiles of a small batch and of a large one."""
    pixels, w, b, p = inputs((2, 6, 30, 6, 80), torch.bfloat16, True, device)
    last = (6, 1, 1, False, SCALE, SHIFT)
    small, large = op._config(1, 80, torch.bfloat16), op._config(10**6, 80, torch.bfloat16)
    assert small["BLOCK_M"] != large["BLOCK_M"]

    def run(x, tile):
        monkeypatch.setattr(op, "_config", lambda *_: dict(tile))
        table = op.grid_table([(1, 5)] * len(x), 0, x.device) if packed else None
        positions = p.repeat(len(x), 1) if packed else p
        y = op.patch_embed_triton(x.flatten() if packed else x, w, b, positions, None, table, *last)
        dx, _ = op.patch_embed_bwd_triton(
            y, (x.flatten() if packed else x).to(w.dtype), w, 6, True, False, table, 0, *last[1:]
        )
        return y.view(len(x), 5, 80), dx.view(len(x), -1)

    for whole, alone in zip(run(pixels, large), run(pixels[1:], small), strict=True):
        assert torch.equal(whole[1], alone[0])


@pytest.mark.parametrize("grids", [[], [(0, 3)], [(2, 0, 3), (0, 2)]], ids=str)
@pytest.mark.parametrize("prefix_rows", [0, 2])
def test_triton_takes_images_without_patches(grids, prefix_rows, device, guard, monkeypatch):
    """Nothing is launched, so that no kernel is compiled for a table that is not there."""
    for name in ("_fwd_kernel", "_rows_kernel", "_bwd_weight_kernel", "_bwd_pixels_kernel"):
        monkeypatch.setattr(op, name, None)
    case = (grids, 1, 1, False, 2, 5)
    *tensors, prefix = packed_inputs(case, torch.float32, False, device, prefix_rows)
    table = op.grid_table(op.segments("patch_embed", grids), prefix_rows, torch.device(device))
    last = (2, 1, 1, False, SCALE, SHIFT)
    y = guard.run(op.patch_embed_triton, *tensors, prefix, table, *last)
    assert torch.equal(y, op.patch_embed_reference(*tensors, prefix, table, *last))
    _, dw = guard.run(op.patch_embed_bwd_triton, y, *tensors[:2], 2, True, True, table, prefix_rows, *last[1:])
    assert torch.equal(dw, torch.zeros_like(tensors[1]))


def test_no_images_at_all():
    """An empty list is what empty grids are."""
    *tensors, prefix = packed_inputs(([], 1, 1, False, 2, 5), torch.float32, True, prefix_rows=2)
    w = tensors[1].requires_grad_()
    for pixels, grids in (([], None), (tensors[0], [])):
        tokens, cu_seqlens = patch_embed_packed(pixels, w, mean=MEAN, std=STD, grid_thw=grids, patch_size=2,
                                                prefix=prefix)  # fmt: skip
        assert tokens.shape == (0, 5)
        assert cu_seqlens.tolist() == [0]
        (dw,) = torch.autograd.grad(tokens.sum(), w)
        assert torch.equal(dw, torch.zeros_like(w))
