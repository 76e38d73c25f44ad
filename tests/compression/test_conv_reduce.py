"""conv_reduce: the modules' own values for any K of a grid, exactly K, mixed sizes, the 16-fold convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from device_calls import assert_compiles, device_calls

from fastmllm.compression.conv_reduce import ConvReduce
from fastmllm.compression.tokens import Tokens

GRIDS = ((1, 6, 4), (1, 4, 4), (2, 4, 8))
OPTIONS = {"c_abstractor": {"hidden": 8, "depth": 1, "grid": 4}, "ldp": {}, "deepseek_ocr": {}}
KEEP = {"c_abstractor": (6, 9, 12), "ldp": (6, 4, 16), "deepseek_ocr": (2, 1, 4)}


def packed(grids=GRIDS, width=6, dtype=torch.float32, seed=3) -> Tokens:
    total = sum(t * h * w for t, h, w in grids)
    return Tokens.of(torch.randn(total, width, generator=torch.Generator().manual_seed(seed), dtype=dtype), grids)


def build(design, keep=None, **options) -> ConvReduce:
    torch.manual_seed(5)
    return ConvReduce(KEEP[design] if keep is None else keep, 6, design=design, **{**OPTIONS[design], **options})


@pytest.mark.parametrize("design", OPTIONS)
def test_keeps_exactly_k_of_every_image_as_alone(design):
    tokens, module = packed(), build(design, width_out=10)
    out, plan = module(tokens)
    assert out.seqlens == KEEP[design]
    assert out.x.shape == (sum(KEEP[design]), 10)
    assert torch.equal(out.pos, tokens.pos[plan.keep])
    pieces = zip(tokens.x.split(tokens.seqlens), GRIDS, KEEP[design], out.x.split(out.seqlens), strict=True)
    for x, grid, k, batched in pieces:
        alone, _ = build(design, k, width_out=10)(Tokens.of(x, [grid]))
        torch.testing.assert_close(alone.x, batched, rtol=1e-5, atol=1e-5)
    others = tokens.x.clone()
    others[24:] += 1  # the images behind the first
    moved = module(tokens.with_x(others))[0].x
    assert torch.equal(moved[: out.seqlens[0]], out.x[: out.seqlens[0]])
    assert not torch.equal(moved, out.x)


@pytest.mark.parametrize("design", OPTIONS)
def test_an_image_that_keeps_all_of_its_tokens_stays_as_it_is(design):
    tokens, module = packed(), build(design)
    assert ConvReduce.forward(build(design, (24, 16, 64)), tokens)[0] is tokens
    mixed = (KEEP[design][0], 16, KEEP[design][2])
    tokens = Tokens.of(tokens.x, GRIDS, planes=(torch.arange(104),))
    out, plan = build(design, mixed)(tokens)
    images, every = out.x.split(out.seqlens), module(tokens)[0]
    assert torch.equal(images[1], tokens.x[24:40])
    for image in (0, 2):
        torch.testing.assert_close(images[image], every.x.split(every.seqlens)[image], rtol=1e-5, atol=1e-5)
    assert torch.equal(out.planes[0], plan.keep)
    assert out.grid[1] == (1, 4, 4)
    torch.testing.assert_close(out.size.split(out.seqlens)[2].sum(), torch.tensor(64.0))
    with pytest.raises(ValueError, match="stays as it is, 6 wide, but the others become 10"):
        build(design, mixed, width_out=10)(tokens)


def test_deepseek_ocr_is_two_strided_convolutions():
    tokens = packed(((1, 8, 8), (1, 8, 8), (1, 5, 6)), dtype=torch.float64)
    module = build("deepseek_ocr", (4, 4, 4)).double()
    w1, w2 = module.body.conv1.weight, module.body.conv2.weight
    assert (w1.shape, w2.shape) == ((12, 6, 3, 3), (6, 12, 3, 3))

    def strided(x, w):  # (C, h, w): each output is the sum over its 3 x 3 neighbourhood
        x = F.pad(x, (1, 1, 1, 1))
        places = [(i, j) for i in range(0, x.shape[1] - 2, 2) for j in range(0, x.shape[2] - 2, 2)]
        y = torch.stack([(w * x[None, :, i : i + 3, j : j + 3]).sum((1, 2, 3)) for i, j in places], 1)
        return y.view(len(w), -1, (x.shape[2] - 1) // 2)

    expected = []
    for x, (_, h, w) in zip(tokens.x.split(tokens.seqlens), tokens.grid, strict=True):
        expected.append(strided(strided(x.t().reshape(6, h, w), w1), w2).flatten(1).t())
    torch.testing.assert_close(module(tokens)[0].x, torch.cat(expected))
    with torch.device("meta"):
        published = ConvReduce(1 / 16, 256, width_out=1024, design="deepseek_ocr")
    out, _ = published(Tokens.of(torch.empty(1, 4096, 256, device="meta")))
    assert (published.body.conv1.out_channels, out.x.shape) == (512, (256, 1024))


def test_the_designs_are_the_published_modules_at_their_sizes():
    tokens = packed(((1, 4, 4), (1, 4, 4)), dtype=torch.float64)
    ldp = build("ldp", 1 / 4).double()
    torch.testing.assert_close(ldp(tokens)[0].x, ldp.body(tokens.x, tokens.grid))  # its own blocks of 2 x 2
    honeybee = build("c_abstractor", 9).double()
    honeybee.body.side = 3
    torch.testing.assert_close(honeybee(tokens)[0].x, honeybee.body(tokens.x, tokens.grid))


@pytest.mark.parametrize("design", OPTIONS)
def test_gradients(design):
    tokens = packed(((1, 4, 4), (1, 4, 4)), dtype=torch.float64)
    module = build(design, 1 if design == "deepseek_ocr" else 4).double()
    x = tokens.x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(tokens.with_x(x))[0].x, (x,), fast_mode=True)
    module(tokens)[0].x.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="deepseek_ocr makes 2 of 1 x 6 x 4 tokens, not 3"):
        build("deepseek_ocr", 3)(packed())
    with pytest.raises(ValueError, match="conv_reduce: 23 tokens do not form a grid"):
        build("ldp", 23)(packed(((1, 6, 4),)))
    with pytest.raises(ValueError, match="design 'conv' is not one of"):
        ConvReduce(4, 6, design="conv")
    with pytest.raises(ValueError, match="tokens of width 5, but its weights are for 6"):
        build("ldp")(packed(width=5))
    with pytest.raises(ValueError, match="no square grid"):
        build("ldp", 2)(Tokens.of(torch.randn(1, 6, 6)))


@pytest.mark.parametrize("design", OPTIONS)
def test_launches_no_more_for_more_images_and_never_waits(design):
    two, six = (Tokens.of(torch.randn(images, 16, 6)) for images in (2, 6))
    keep = 1 if design == "deepseek_ocr" else 4
    few = device_calls(build(design, keep), two).names
    assert device_calls(build(design, keep), six).names == few
    assert device_calls(build(design), packed()).names


@pytest.mark.parametrize("design", OPTIONS)
def test_compiles(design):
    assert_compiles(build(design), packed())
