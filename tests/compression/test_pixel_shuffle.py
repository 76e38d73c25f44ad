"""pixel_shuffle: equal to its formula in each order and norm, one factor of all images, clear errors, no waiting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from device_calls import assert_compiles, device_calls

from fastmllm.compression import compress
from fastmllm.compression.pixel_shuffle import PixelShuffle
from fastmllm.compression.tokens import Tokens

GRIDS = ((1, 4, 6), (1, 2, 2), (2, 4, 2))


def packed(grids=GRIDS, width=3, dtype=torch.float64) -> Tokens:
    total = sum(t * h * w for t, h, w in grids)
    return Tokens.of(torch.randn(total, width, generator=torch.Generator().manual_seed(1), dtype=dtype), grids)


def formula(x, grid, s, order):
    """Gather block after block, channel after channel."""
    (t, h, w), rows = grid, []
    for frame in x.view(t, h, w, -1):
        blocks = [(r, c) for r in range(0, h, s) for c in range(0, w, s)]
        if order == "columns":
            blocks.sort(key=lambda b: (b[1], b[0]))
        rows += [frame[r : r + s, c : c + s].reshape(-1) for r, c in blocks]
    return torch.stack(rows)


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_equals_the_formula_on_images_of_different_sizes(order):
    tokens = packed()
    out, plan = PixelShuffle(1 / 4, order=order)(tokens)
    parts = zip(tokens.x.split(tokens.seqlens), GRIDS, strict=True)
    assert torch.equal(out.x, torch.cat([formula(x, grid, 2, order) for x, grid in parts]))
    assert out.seqlens == (6, 1, 4)
    for image in range(3):
        alone = packed((GRIDS[image],))
        alone = alone.with_x(tokens.x.split(tokens.seqlens)[image])
        assert torch.equal(PixelShuffle(1 / 4, order=order)(alone)[0].x, out.x.split(out.seqlens)[image])
    # each token's features stand in the row that the plan counts it in, and that row stands at one of its own tokens
    for token, row in enumerate(plan.assign.tolist()):
        assert (out.x[row].view(4, 3) == tokens.x[token]).all(1).any()
    assert torch.equal(plan.assign[plan.keep], torch.arange(11))
    assert torch.equal(out.pos, tokens.pos[plan.keep])
    assert out.size.tolist() == [4.0] * 11


def test_is_internvl_s():
    """The published v2: (n, w, h, c) -> view, permute, view, permute; v1 leaves out the last permute."""
    x = torch.randn(2, 16, 5)
    y = x.view(2, 4, 4, 5).reshape(2, 4, 2, 10).permute(0, 2, 1, 3).reshape(2, 2, 2, 20)
    assert torch.equal(compress(x, "pixel_shuffle", keep=4, order="columns"), y.reshape(2, 4, 20))
    assert torch.equal(compress(x, "pixel_shuffle", keep=4), y.permute(0, 2, 1, 3).reshape(2, 4, 20))


@pytest.mark.parametrize("s", [2, 3])
def test_is_idefics3_s(s):
    x, side = torch.randn(2, 36, 5), 6
    y = x.view(2, side, side, 5).view(2, side, side // s, 5 * s).permute(0, 2, 1, 3)
    y = y.reshape(2, side // s, side // s, 5 * s * s).permute(0, 2, 1, 3).reshape(2, 36 // s**2, -1)
    assert torch.equal(compress(x, "pixel_shuffle", keep=1 / s**2), y)


def test_is_qwen_s_merger_up_to_its_mlp():
    tokens = packed()
    module = PixelShuffle(1 / 4, order="merged", norm="token", width=3, eps=1e-6).double()
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    out, plan = module(tokens)
    expected = F.layer_norm(tokens.x, (3,), module.weight, module.bias, 1e-6).view(-1, 12)
    torch.testing.assert_close(out.x, expected)
    assert plan.assign.tolist() == [i // 4 for i in range(44)]
    assert plan.keep.tolist() == [4 * i + 3 for i in range(11)]  # bottom right, as with the other orders


def test_the_norm_over_blocks_stands_behind():
    tokens = packed()
    module = PixelShuffle(1 / 4, norm="block", width=3).double()
    torch.nn.init.normal_(module.weight)
    plain = PixelShuffle(1 / 4)(tokens)[0].x
    torch.testing.assert_close(module(tokens)[0].x, F.layer_norm(plain, (12,), module.weight, module.bias))
    x = tokens.x[:4].clone().requires_grad_()
    small = packed(((1, 2, 2),))
    assert torch.autograd.gradcheck(lambda x, w: _normed(module, small.with_x(x), w), (x, module.weight))


def _normed(module, tokens, weight):
    return torch.func.functional_call(module, {"weight": weight}, (tokens,))[0].x


def test_planes_and_sizes_go_along():
    tokens = packed()
    ids = torch.arange(len(tokens.x))
    tokens = Tokens.of(tokens.x, GRIDS, planes=(ids, tokens.x * 2))
    out, plan = PixelShuffle(1 / 4)(tokens)
    assert torch.equal(out.planes[0], plan.keep)
    assert torch.equal(out.planes[1], out.x * 2)
    twice, _ = PixelShuffle((1,))(PixelShuffle(1 / 4)(packed(((1, 4, 4),)))[0])
    assert twice.size.tolist() == [16.0]
    renumbered, _ = PixelShuffle(1 / 4, position="renumber")(tokens)
    assert renumbered.pos[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 3]


def test_the_whole_grid_is_the_identity():
    tokens = packed()
    assert PixelShuffle(1.0)(tokens)[0] is tokens


@pytest.mark.parametrize(
    ("keep", "grid", "message"),
    [
        (5, (1, 4, 6), r"1 x 4 x 6 tokens cannot become 5: blocks of s x s leave 24, 6;"),
        (1 / 4, (1, 3, 5), "cannot become 4: blocks of s x s leave 15;"),
        (1 / 9, (1, 4, 6), "cannot become 3"),
        (0, (1, 4, 6), "keep 0 must lie in 1..24"),
        (25, (1, 4, 6), "keep 25 must lie in 1..24"),
    ],
)
def test_refuses_what_is_no_block(keep, grid, message):
    with pytest.raises(ValueError, match=f"pixel_shuffle: .*{message}"):
        PixelShuffle(keep)(packed((grid,)))


def test_refuses_two_factors_and_options_that_do_not_fit():
    with pytest.raises(ValueError, match=r"blocks of different sides \[1, 2\]"):
        PixelShuffle(4)(packed(((1, 2, 2), (1, 4, 4))))
    with pytest.raises(ValueError, match="no square grid"):
        PixelShuffle(1 / 2)(Tokens.of(torch.randn(1, 6, 4)))
    for options in ({"order": "up"}, {"norm": "rms", "width": 3}, {"norm": "token"}, {"width": 3}):
        with pytest.raises(ValueError, match="pixel_shuffle: "):
            PixelShuffle(1 / 4, **options)
    for keep in (4, 0.2, (1, 2)):
        with pytest.raises(ValueError, match="must be a fraction 1 / s"):
            PixelShuffle(keep, norm="block", width=3)


def test_launches_fewer_kernels_than_published_and_never_waits():
    tokens = Tokens.of(torch.randn(13, 16, 8))
    module = PixelShuffle(1 / 4, norm="block", width=8)
    assert len(device_calls(module, tokens).names) <= 3  # the published shuffle and norm of 13 tiles


@pytest.mark.parametrize("order", ["rows", "columns", "merged"])
def test_compiles(order):
    assert_compiles(PixelShuffle(1 / 4, order=order, norm="block", width=3), packed(dtype=torch.float32))
