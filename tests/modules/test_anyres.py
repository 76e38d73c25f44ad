"""AnyResPacker against pack_image_features of transformers 5.23, forward and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from fastmllm.data.resolution import AnyRes
from fastmllm.modules.anyres import AnyResPacker

D, SIDE, TILE = 8, 4, 28
PINPOINTS = ((28, 28), (28, 56), (56, 28), (56, 56), (84, 28), (28, 84), (84, 112))
SIZES = ((50, 20), (56, 56), (20, 61), (17, 90), (112, 84), (110, 75), (28, 28), (300, 299), (9, 7))  # (width, height)


def policy(max_tiles: int | None) -> AnyRes:
    return AnyRes(image_size=TILE, patch_size=TILE // SIDE, pinpoints=PINPOINTS, max_tiles=max_tiles)


def upstream(max_tiles: int | None, features: list[Tensor], sizes: list[tuple[int, int]], newline: Tensor):
    """Call the oracle's method on a stand-in that has what it reads: its configuration."""
    vision = SimpleNamespace(image_size=TILE, patch_size=TILE // SIDE)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=[*map(list, PINPOINTS)]))
    shapes = torch.tensor([(h, w) for w, h in sizes])
    if max_tiles is None:
        return LlavaNextModel.pack_image_features(model, features, shapes, "full", image_newline=newline)
    ratio = f"anyres_max_{max_tiles}"
    return LlavaOnevisionModel.pack_image_features(
        model, features, shapes, image_newline=newline, vision_aspect_ratio=ratio
    )


@pytest.mark.parametrize("max_tiles", [None, 1, 2, 4, 12])
def test_equals_pack_image_features(max_tiles):
    packer, rule = AnyResPacker(D), policy(max_tiles)
    regrids = [rule.plan(*size).regrid for size in SIZES]
    if max_tiles is not None:
        shrunk = [(r.height, r.width) != (r.out_height, r.out_width) for r in regrids]
        assert any(shrunk) == (max_tiles < 12), "the case is there to be tested"
    counts = [1 + r.rows * r.columns for r in regrids]
    regrids.insert(3, None)  # a single tile among them, as of a sample with several images
    counts.insert(3, 1)
    sizes = [*SIZES[:3], (28, 28), *SIZES[3:]]
    features = torch.randn(sum(counts), SIDE**2, D, requires_grad=True)
    packed, lengths = packer(features, regrids)

    theirs = features.detach().clone().requires_grad_()
    newline = packer.newline.detach().clone().requires_grad_()
    expected, their_lengths = upstream(max_tiles, list(theirs.split(counts)), sizes, newline)
    expected = torch.cat(expected)
    assert lengths == their_lengths.tolist()
    assert lengths[0] == rule.plan(*SIZES[0]).llm_tokens
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-6)
    if max_tiles in (None, 12):
        assert torch.equal(packed, expected), "rows are moved, not computed"

    weight = torch.randn_like(expected)
    packed.backward(weight)
    expected.backward(weight)
    torch.testing.assert_close(features.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packer.newline.grad, newline.grad, rtol=1e-4, atol=1e-4)
    assert (features.grad == 0).all(-1).any(), "padding has no gradient"


@pytest.mark.parametrize("max_tiles", [None, 1])
def test_an_image_does_not_depend_on_its_neighbours(max_tiles):
    packer, rule = AnyResPacker(D), policy(max_tiles)
    regrids = [rule.plan(*size).regrid for size in SIZES]
    counts = [1 + r.rows * r.columns for r in regrids]
    parts = torch.randn(sum(counts), SIDE**2, D).split(counts)
    together, lengths = packer(torch.cat(parts), regrids)
    for alone, regrid, found in zip(parts, regrids, together.split(lengths), strict=True):
        assert torch.equal(packer(alone, [regrid])[0], found)


def test_text_only_and_bf16():
    packer = AnyResPacker(D)
    packed, lengths = packer(torch.zeros(0, SIDE**2, D), [])
    assert packed.shape == (0, D)
    assert lengths == []
    regrid = policy(1).plan(110, 75).regrid
    half = packer.bfloat16()
    features = torch.randn(1 + regrid.rows * regrid.columns, SIDE**2, D, dtype=torch.bfloat16)
    packed, lengths = half(features, [regrid])
    assert packed.dtype == torch.bfloat16
    assert packed.shape == (regrid.num_tokens, D)
    assert torch.equal(packed[: SIDE**2], features[0])
    assert torch.equal(packed[SIDE**2 + regrid.out_width], half.newline)


def test_gradcheck():
    packer = AnyResPacker(3).double()
    regrids = [policy(1).plan(*size).regrid for size in ((50, 20), (110, 75))]
    features = torch.randn(sum(1 + r.rows * r.columns for r in regrids), SIDE**2, 3, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda x, n: torch.func.functional_call(packer, {"newline": n}, (x, regrids))[0],
        (features.requires_grad_(), packer.newline.detach().requires_grad_()),
        fast_mode=True,
    )


def test_what_does_not_fit_is_refused():
    packer = AnyResPacker(D)
    regrid = policy(None).plan(50, 20).regrid
    with pytest.raises(ValueError, match=r"features of 4 tiles, but the images have 3"):
        packer(torch.zeros(4, SIDE**2, D), [regrid])
    with pytest.raises(ValueError, match=r"tiles of 9 tokens are not the 4 x 4 planned"):
        packer(torch.zeros(3, 9, D), [regrid])
    with pytest.raises(ValueError, match=r"features \(3, 16, 5\) must be \(tiles, N, 8\)"):
        packer(torch.zeros(3, 16, 5), [regrid])
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        AnyResPacker(0)
