"""Nested queries against the formula of MQT-LLaVA's connector in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmllm.modules.nested_queries import NestedQueries, sine_table


def redrawn() -> NestedQueries:
    torch.manual_seed(0)
    module = NestedQueries(8, 5, max_queries=16, num_heads=2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double()


def formula(m: NestedQueries, x, grid, n):
    """torch's own attention: queries and their positions, the resampled table as keys, the image as values."""

    def norm(part, layer):
        return F.layer_norm(part, (8,), layer.weight, layer.bias, 1e-6)

    table = m.position.view(1, 4, 4, 8).permute(0, 3, 1, 2)
    table = F.interpolate(table, grid[1:], mode="bicubic").permute(0, 2, 3, 1).flatten(0, 2).repeat(grid[0], 1)
    query = norm(m.queries[:n] + m.position[:n], m.norm_query)
    parts = [query[:, None], norm(table, m.norm_key)[:, None], norm(x, m.norm_value)[:, None]]
    weight = torch.cat([m.q.weight, m.k.weight, m.v.weight])
    bias = torch.cat([m.q.bias, m.k.bias, m.v.bias])
    y, _ = F.multi_head_attention_forward(
        *parts, 8, 2, weight, bias, None, None, False, 0.0, m.proj.weight, m.proj.bias, need_weights=False
    )
    return y[:, 0] @ m.out.weight.t()


def test_equals_the_formula_and_its_gradients():
    module, grids, counts = redrawn(), [(1, 3, 5), (1, 6, 6), (1, 6, 6), (2, 4, 4)], [16, 3, 3, 7]
    sizes = [t * h * w for t, h, w in grids]
    x = torch.randn(sum(sizes), 8, dtype=torch.float64, requires_grad=True)
    y = module(x, grids, counts)
    expected = torch.cat([formula(module, p, g, n) for p, g, n in zip(x.split(sizes), grids, counts, strict=True)])
    torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-9)
    seed = torch.randn_like(y)
    wanted = [x, *module.parameters()]
    for a, b in zip(torch.autograd.grad(y, wanted, seed), torch.autograd.grad(expected, wanted, seed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_the_table_is_mae_s():
    table = sine_table(3, 8)
    for row in range(3):
        for column in range(3):
            parts = []
            for place in (column, row):
                angles = place * torch.tensor([1.0, 10000.0**-0.5])
                parts += [angles.sin(), angles.cos()]
            torch.testing.assert_close(table[row * 3 + column], torch.cat(parts))


def test_refuses_sizes_and_counts_that_do_not_fit():
    for options in ({"max_queries": 15}, {"num_heads": 3}, {"num_heads": 0}):
        with pytest.raises(ValueError, match="NestedQueries: sizes must be"):
            NestedQueries(8, 5, **{"max_queries": 16, "num_heads": 2, **options})
    module = redrawn()
    for counts in ([17], [0]):
        with pytest.raises(ValueError, match=r"must lie in 1\.\.16"):
            module(torch.randn(16, 8, dtype=torch.float64), [(1, 4, 4)], counts)
    with pytest.raises(ValueError, match="do not fit"):
        module(torch.randn(16, 8, dtype=torch.float64), [(1, 4, 5)], [1])
    assert module(torch.randn(0, 8, dtype=torch.float64), [], []).shape == (0, 5)
