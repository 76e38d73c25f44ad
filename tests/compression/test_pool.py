"""pool: nested sets, what commutes, where each token is counted, videos and mixed sizes, launches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from device_calls import assert_compiles, device_calls
from visual_tokens import pictures

from fastmllm.compression.pool import Pool
from fastmllm.compression.tokens import Plan, Tokens


def images(*grids, width=4, dtype=torch.float64) -> Tokens:
    total = sum(t * h * w for t, h, w in grids)
    return Tokens.of(torch.randn(total, width, generator=torch.Generator().manual_seed(2), dtype=dtype), grids)


def matrix(plan: Plan, rows: int) -> torch.Tensor:
    """Return M of y = M x, each row the mean of what is counted in it."""
    m = F.one_hot(plan.assign, rows).t().double()
    return m / m.sum(1, keepdim=True)


@pytest.mark.parametrize("interpolation", ["average", "bilinear"])
def test_commutes_with_a_linear_layer(interpolation):
    tokens = images((1, 6, 6), (1, 5, 7), (2, 4, 3))
    linear = torch.nn.Linear(4, 9, dtype=torch.float64)
    module = Pool((4, 6, 4), interpolation=interpolation)
    behind = module(tokens.with_x(linear(tokens.x)))[0].x
    assert (linear(module(tokens)[0].x) - behind).abs().max() < 1e-14


def test_nested_sets_are_those_of_each_size_and_of_each_other():
    tokens = Tokens.of(torch.randn(2, 144, 3, dtype=torch.float64))  # Matryoshka's 576 / 4
    sets = Pool(1).nested(tokens, (144, 36, 9, 1))
    assert [s.seqlens for s in sets] == [(144,) * 2, (36,) * 2, (9,) * 2, (1,) * 2]
    assert sets[0] is tokens
    maps = tokens.x.view(2, 12, 12, 3).permute(0, 3, 1, 2)
    for one, side in zip(sets[1:], (6, 3, 1), strict=True):
        expected = F.avg_pool2d(maps, 12 // side).permute(0, 2, 3, 1).reshape(-1, 3)
        torch.testing.assert_close(one.x, expected)
        assert one.size.tolist() == [144 / side**2] * (2 * side**2)
    # each is the pool of the one before, with the same tokens behind each
    for before, after in pairwise(sets):
        again, _ = Pool(after.seqlens[0])(before)
        torch.testing.assert_close(again.x, after.x)
        assert torch.equal(again.size, after.size)
    loss = sum(s.x.square().mean() for s in Pool(1).nested(tokens.with_x(tokens.x.requires_grad_()), (36, 9, 1)))
    loss.backward()
    assert tokens.x.grad.ne(0).all()


@pytest.mark.parametrize("interpolation", ["average", "bilinear"])
def test_the_plan_counts_each_token_where_windows_do_not_overlap(interpolation):
    tokens = images((1, 6, 4), (2, 4, 4))
    out, plan = Pool((6, 8), interpolation=interpolation)(tokens)
    torch.testing.assert_close(matrix(plan, 14) @ tokens.x, out.x)
    assert torch.equal(plan.assign[plan.keep], torch.arange(14))
    assert torch.equal(out.pos, tokens.pos[plan.keep])


def test_a_token_in_two_windows_is_counted_in_none():
    assert Pool(4)(images((1, 5, 4)))[1].assign is None  # rows 0-2 and 2-4
    assert Pool(4)(images((1, 8, 8)))[1].assign is not None
    assert Pool(4, interpolation="bilinear")(images((1, 8, 8)))[1].assign is None  # it reads every other token


def test_images_of_different_sizes_are_pooled_as_alone():
    tokens, _ = pictures()
    out, _ = Pool((6, 4, 2))(tokens)
    assert out.grid == ((1, 2, 3), (1, 2, 2), (2, 1, 1))
    x, begin = tokens.x.split(tokens.seqlens), 0
    for image, k in enumerate(out.seqlens):
        alone, _ = Pool(k)(Tokens.of(x[image], [tokens.grid[image]]))
        assert torch.equal(alone.x, out.x[begin : begin + k])
        begin += k


def test_planes_of_any_shape_are_pooled_or_taken():
    tokens = images((1, 4, 4))
    ids, weight, deep = torch.arange(16), torch.randn(16), torch.randn(16, 2, 3)
    tokens = Tokens.of(tokens.x, tokens.grid, planes=(ids, weight, deep))
    out, plan = Pool(4)(tokens)
    assert torch.equal(out.planes[0], plan.keep)
    m = matrix(plan, 4).float()
    torch.testing.assert_close(out.planes[1], m @ weight)
    torch.testing.assert_close(out.planes[2], torch.einsum("kn,nab->kab", m, deep))


def test_gradients():
    tokens = images((1, 3, 4), (1, 2, 2))
    x = tokens.x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Pool((4, 1))(tokens.with_x(x))[0].x, (x,))


def test_launches_as_many_kernels_as_published_and_never_waits():
    assert len(device_calls(Pool(4), Tokens.of(torch.randn(32, 16, 8))).names) <= 2
    assert len(device_calls(Pool((6, 4, 2)), pictures()[0]).names) <= 2


def test_compiles():
    assert_compiles(Pool((6, 4, 2)), pictures()[0])
