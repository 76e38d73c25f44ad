"""Token Merging inside a vision transformer against its formula in fp64, and probes of a tower's attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from merge_by_hand import merge_round

from fastmllm.compression.merge_schedule import merge_schedule
from fastmllm.models.vision import VisionConfig, VisionTransformer


def tower(cls_token: bool, dtype: torch.dtype = torch.float64, **options) -> VisionTransformer:
    torch.manual_seed(0)
    config = VisionConfig(width=16, depth=3, num_heads=2, patch_size=2, image_size=8, cls_token=cls_token, **options)
    model = VisionTransformer(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def formula(model: VisionTransformer, x: torch.Tensor, schedule: list[int], protected: int) -> torch.Tensor:
    """Token Merging of one image, (N, D): the paper's algorithm on dense matrices."""
    size = torch.ones(len(x), dtype=x.dtype)
    for block, r in zip(model.blocks, schedule, strict=True):
        heads = block.attn.num_heads
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in block.attn.qkv(block.norm1(x)).chunk(3, -1))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + size.log()
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + block.scale1 * block.attn.proj(attended)
        x, size = merge_round(x, k.mean(1), size, r, protected)
        x = x + block.scale2 * block.mlp(block.norm2(x))
    return model.norm(x)


@pytest.mark.parametrize("cls_token", [False, True])
def test_equals_the_formula_for_images_of_different_sizes(cls_token):
    model = tower(cls_token)
    images = [torch.rand(8, 8, 3, dtype=torch.float64), torch.rand(6, 8, 3, dtype=torch.float64)]  # 16, 12 patches
    tokens, _ = model.encode(images, merge=(7, 5))
    assert tokens.seqlens == (7, 5)
    assert tokens.size.tolist() and tokens.size[:7].sum() == 16 and tokens.size[7:].sum() == 12  # noqa: PT018
    x, cu_seqlens, _ = model._embed(images, None, "hwc")
    lead, begin = int(cls_token), 0
    for image, (n, k) in enumerate(((16, 7), (12, 5))):
        schedule = [r[0] for r in merge_schedule([n + lead], [k + lead], 3, lead)]
        alone = formula(model, x[cu_seqlens[image] : cu_seqlens[image + 1]], schedule, lead)[lead:]
        torch.testing.assert_close(tokens.x[begin : begin + k], alone)
        begin += k


def test_no_merging_is_the_plain_tower_and_gradients_reach_it():
    model = tower(True)
    images = torch.rand(2, 8, 8, 3, dtype=torch.float64)
    whole, _ = model.encode(images, merge=16)
    torch.testing.assert_close(whole.dense(), model(images))
    assert torch.equal(whole.pos.flatten(), torch.arange(16).repeat(2))
    merged, _ = model.encode(images, merge=0.5)
    merged.x.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("cls_token", [False, True])
@pytest.mark.parametrize("layer", [0, -1, -2])
def test_a_probe_is_the_attention_of_its_layer(cls_token, layer):
    model = tower(cls_token, layer_scale=None)
    images = [torch.rand(8, 8, 3, dtype=torch.float64), torch.rand(6, 4, 3, dtype=torch.float64)]
    tokens, probe = model.encode(images, probe_layer=layer)
    torch.testing.assert_close(tokens.x, model.forward_packed(images))
    x, cu_seqlens, _ = model._embed(images, None, "hwc")
    expected, keys = [], []
    for a, b in itertools.pairwise(cu_seqlens):
        y = x[a:b]
        for index, block in enumerate(model.blocks):
            q, k, v = (t.unflatten(-1, (2, -1)) for t in block.attn.qkv(block.norm1(y)).chunk(3, -1))
            p = (torch.einsum("qhd,khd->hqk", q, k) / 8**0.5).softmax(-1)
            if index == layer % 3:
                expected.append(p.mean((0, 1))[int(cls_token) :])
                keys.append(k.mean(1)[int(cls_token) :])
            y = y + block.attn.proj(torch.einsum("hqk,khd->qhd", p, v).flatten(1))
            y = y + block.mlp(block.norm2(y))
    torch.testing.assert_close(probe.received("all"), torch.cat(expected))
    torch.testing.assert_close(probe.keys(), torch.cat(keys), rtol=1e-5, atol=1e-5)  # the mean is taken in fp32


def test_schedules_are_even_and_end_at_the_budget():
    assert merge_schedule([16], [7], 3, 0) == [[3], [3], [3]]
    assert merge_schedule([17, 9], [10, 9], 3, 1) == [[3, 0], [2, 0], [2, 0]]
    assert [r[0] for r in merge_schedule([65], [5], 10, 1)] == [6, 6, 6, 6, 6, 6, 6, 6, 8, 4]  # no block more than half
    assert [r[0] for r in merge_schedule([64], [1], 6, 0)] == [32, 16, 8, 4, 2, 1]
    with pytest.raises(ValueError, match="2 blocks that halve"):
        merge_schedule([16], [3], 2, 0)


def test_what_does_not_merge_is_refused():
    images = torch.rand(1, 8, 8, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="pre-norm blocks, for one layer"):
        tower(False, layer=(1, 2), final_norm=False).encode(images, merge=4)
    with pytest.raises(ValueError, match="layer 2 does not run, 2 of 3"):
        tower(False, layer=-2, final_norm=False).encode(images, probe_layer=2)
    with pytest.raises(ValueError, match=r"keep 17 must lie in 1\.\.16"):
        tower(False).encode(images, merge=17)
