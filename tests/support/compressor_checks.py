"""What holds of every compressor: exactly K, the identity, as alone, with everything that belongs to a token."""

from __future__ import annotations

from dataclasses import replace

import torch
from visual_tokens import GRIDS, pictures

from fastmllm.compression.budget import tokens_to_keep
from fastmllm.compression.tokens import Tokens

BUDGETS = (1, 7, 0.5, (15, 1, 6), (14, 16, 9))


def assert_exact_and_as_alone(make, keep, grids=GRIDS):
    """Compare each image of a batch to itself alone, bit by bit; `make(keep)` builds the compressor."""
    tokens, evidence = pictures(grids)
    out, plan = make(keep)(tokens, evidence)
    budgets = tokens_to_keep("", keep, tokens.seqlens)
    assert out.seqlens == budgets
    assert out.cu_seqlens.tolist() == [0, *torch.tensor(budgets).cumsum(0).tolist()]
    assert torch.equal(out.pos, tokens.pos[plan.keep])
    assert torch.equal(plan.keep.unique(), plan.keep.sort().values)
    first = begin = 0
    for image, (grid, k, n) in enumerate(zip(grids, budgets, tokens.seqlens, strict=True)):
        single, own = pictures((grid,), seed=image)
        own = replace(own, relevance=evidence.relevance[first : first + n], scores=evidence.scores[first : first + n])
        alone, _ = make(k)(single, own)
        assert torch.equal(alone.x, out.x[begin : begin + k])
        assert torch.equal(alone.pos, out.pos[begin : begin + k])
        first, begin = first + n, begin + k
    whole, _ = make(1.0)(tokens, evidence)
    assert whole is tokens


def assert_planes_go_along(compressor, grids=GRIDS):
    tokens, evidence = pictures(grids)
    ids = torch.arange(len(tokens.x))
    size = 1 + torch.arange(len(ids)) % 3
    rich = replace(
        Tokens.of(tokens.x, grids, pos=ids[:, None].expand(-1, 3), planes=(ids, tokens.x * 2)), size=size.float()
    )
    out, plan = compressor(rich, evidence)
    assert torch.equal(out.planes[0], plan.keep)
    assert torch.equal(out.planes[1], 2 * tokens.x[plan.keep])
    assert torch.equal(out.pos, plan.keep[:, None].expand(-1, 3))
    if plan.assign is None:
        assert torch.equal(out.size, rich.size[plan.keep])
    else:
        torch.testing.assert_close(out.size, torch.zeros_like(out.size).index_add(0, plan.assign, rich.size))


def assert_selects_with_gradients(compressor, grids=GRIDS):
    """What it keeps is what was there, and a gradient reaches that alone."""
    tokens, evidence = pictures(grids)
    x = tokens.x.clone().requires_grad_()
    out, plan = compressor(tokens.with_x(x), evidence)
    assert torch.equal(out.x, tokens.x[plan.keep])
    out.x.sum().backward()
    assert x.grad[plan.keep].eq(1).all()
    assert x.grad.sum() == out.x.numel()


def assert_compiles(compressor, grids=GRIDS):
    """Compile it as one graph: no value of a tensor decides anything."""
    tokens, evidence = pictures(grids)
    torch.compiler.reset()
    compiled, _ = torch.compile(compressor, fullgraph=True, backend="aot_eager")(tokens, evidence)
    assert torch.equal(compiled.x, compressor(tokens, evidence)[0].x)
