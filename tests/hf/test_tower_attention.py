"""Attention of packed towers: one call over ragged windows and images of several sizes; what runs transformers'."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from operators_seen import Names
from oracle import assert_as_accurate
from tiny_hf_qwen import pixels, qwen2_5_vl, qwen2_vl, qwen3_vl

from fastmllm.hf import patch, unpatch
from fastmllm.hf.fused.tower_attention import TowerAttention

GRIDS = [[1, 6, 10], [2, 4, 4], [1, 2, 6]]  # windows of 2 x 2 tokens: an image of ragged ones, a video, a narrow image
BUILDERS = [qwen2_vl, qwen2_5_vl, qwen3_vl]


@pytest.fixture(scope="module")
def towers():
    return {build.__name__: build().model.visual for build in BUILDERS}


@pytest.fixture(params=[b.__name__ for b in BUILDERS])
def tower(request, towers):
    tower = towers[request.param]
    yield tower
    unpatch(tower)


def packed(rows=25, heads=4, width=8):
    """Return rows, boundaries of three segments, and tables of a head's width."""
    generator = torch.Generator().manual_seed(3)
    angles = torch.randn(rows, width // 2, generator=generator).repeat(1, 2)
    x = torch.randn(rows, heads * width, generator=generator)
    return x, torch.tensor([0, 9, 13, rows], dtype=torch.int32), (angles.cos(), angles.sin())


def formula(module, x, ends, tables):
    """SDPA segment by segment, in the dtype of x."""
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).unbind(1)
    cos, sin = (t.to(x.dtype)[:, None] for t in tables)
    q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(t[a:b].transpose(0, 1) for t in (q, k, v)), scale=module.scaling
        )
        for a, b in pairwise(ends.tolist())
    ]
    return module.proj(torch.cat(parts, 1).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_segments_are_those_of_sdpa_one_by_one(tower, dtype):
    x, ends, tables = packed()
    up = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))

    def run(module, dtype, function):
        module, leaf = copy.deepcopy(module).to(dtype), x.to(dtype).requires_grad_()
        y = function(module, leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], up.to(dtype))]

    def call(module, x):
        return module(x, cu_seqlens=ends, position_embeddings=tables)

    module = copy.deepcopy(tower.blocks[0].attn)
    module.scaling = 0.5  # not that of its width
    truth = run(module, torch.float64, lambda m, x: formula(m, x, ends, tables))
    theirs = run(module, dtype, call)
    patch(module, ops=["attention"])
    for a, b, c in zip(run(module, dtype, call), theirs, truth, strict=True):
        assert_as_accurate(a, b, c)


def test_one_attention_call_a_layer(tower):
    x = pixels(GRIDS, 1)
    with torch.no_grad(), Names() as before:
        tower(x, torch.tensor(GRIDS))
    patch(tower, ops=["attention"])
    with torch.no_grad(), Names() as after:
        tower(x, torch.tensor(GRIDS))
    layers = len(tower.blocks)
    assert before.count("scaled_dot_product") >= 4 * layers  # one an image or frame, or one a window
    assert (after.count("fastmllm::attention"), after.count("fastmllm::vision_rope")) == (layers, layers)


def test_tables_are_halved_once_for_all_layers(tower):
    x, ends, tables = packed()
    module = tower.blocks[0].attn
    patch(module, ops=["attention"])
    first = module(x, cu_seqlens=ends, position_embeddings=tables)
    with Names() as names:
        assert torch.equal(module(x, cu_seqlens=ends, position_embeddings=tables), first)
    assert names.count("aten::clone") == 0
    with torch.no_grad():
        for table in tables:
            table.copy_(table.flip(0))
    again = module(x, cu_seqlens=ends, position_embeddings=tables)
    torch.testing.assert_close(again, formula(module, x, ends, tables))  # a table written to is halved anew
    with torch.inference_mode():
        made = tuple(table.clone() for table in tables)
        torch.testing.assert_close(module(x, cu_seqlens=ends, position_embeddings=made), again.detach())


def test_an_image_does_not_see_another(tower):
    patch(tower, ops=["attention"])
    x, grids = pixels(GRIDS, 1), torch.tensor(GRIDS)
    with torch.no_grad():
        together = tower(x, grids).pooler_output
        parts = x.split(grids.prod(1).tolist())
        alone = [tower(p, g[None]).pooler_output for p, g in zip(parts, grids, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tower, reentrant):
    x, grids = pixels(GRIDS, 1).requires_grad_(), torch.tensor(GRIDS)

    def gradients():
        y = tower.train()(x, grids).pooler_output
        return torch.autograd.grad(y.square().sum(), [p for n, p in tower.named_parameters() if "deepstack" not in n])

    expected = gradients()
    patch(tower, ops=["attention"])
    tower.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # refuses torch.autograd.grad
        tower.zero_grad()
        tower(x, grids).pooler_output.square().sum().backward()
        found = [p.grad for n, p in tower.named_parameters() if "deepstack" not in n]
        tower.zero_grad()
    else:
        found = gradients()
    tower.gradient_checkpointing_disable()
    tower.eval()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_compiles_whole(towers):
    """Also without a maximum, for which a bound is taken: reading it would break the graph."""
    x, ends, tables = packed()
    module = towers["qwen2_5_vl"].blocks[0].attn
    patch(module, ops=["attention"])
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = module(x, cu_seqlens=ends, position_embeddings=tables)
        torch.testing.assert_close(compiled(x, cu_seqlens=ends, position_embeddings=tables), expected)
    unpatch(module)


def test_what_it_cannot_do_runs_transformers(towers):
    x, ends, tables = packed()
    module = towers["qwen2_vl"].blocks[0].attn
    expected = module(x, cu_seqlens=ends, position_embeddings=tables)
    report = patch(module, ops=["attention"])
    module.config._attn_implementation = "eager"
    found = [module(x, cu_seqlens=ends, position_embeddings=tables)]
    module.config._attn_implementation = "sdpa"
    found.append(module(x, cu_seqlens=ends, position_embeddings=tables, output_attentions=True))
    module.train().attention_dropout = 1e-9
    found.append(module(x, cu_seqlens=ends, position_embeddings=tables))
    module.eval().attention_dropout = 0.0
    assert [sum(module_calls.values()) for module_calls in report.fallbacks().values()] == [3]
    unpatch(module)
    for y in found:
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "attribute, value, reason",
    [("head_dim", 7, "wide"), ("num_key_value_groups", 2, "groups of 2"), ("is_causal", True, "causal"),
     ("qkv", None, "no qkv")],
)  # fmt: skip
def test_another_structure_is_left(attribute, value, reason):
    module = qwen2_vl().model.visual.blocks[0].attn
    assert TowerAttention.refuses(module) is None
    setattr(module, attribute, value)
    assert reason in TowerAttention.refuses(module)
