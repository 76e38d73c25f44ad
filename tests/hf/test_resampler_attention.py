"""Idefics2's resampler: images with padding in any place, and without."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_checks import allowed, distance
from tiny_hf import draw
from tiny_hf_fusion import idefics2

from fastmllm.hf import patch
from fastmllm.hf.fused.resampler_attention import PaddingFirst, ResamplerAttention

PADDING = {
    "none": [[1] * 9, [1] * 9],
    "right and below": [[1, 1, 0, 1, 1, 0, 0, 0, 0], [1] * 9],
    "of all": [[1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 1, 0, 0]],
    "everything": [[0] * 9, [1, 0, 1, 0, 1, 0, 1, 0, 1]],
}


@pytest.fixture
def resampler():
    return idefics2().model.connector.perceiver_resampler.eval()


def results(module, padding, dtype, of_padding=0.0):
    """Return the latents, and the gradients of context and parameters."""
    module = copy.deepcopy(module).to(dtype)
    mask = torch.tensor(PADDING[padding], dtype=torch.bool)
    context = draw(2, 9, 48).bfloat16().to(dtype)
    context = torch.where(mask[..., None], context, context + of_padding).requires_grad_()
    out = module(context=context, attention_mask=mask)
    out = out if torch.is_tensor(out) else out.last_hidden_state
    out.backward(draw(*out.shape, seed=9).bfloat16().to(dtype))
    return [out.detach(), context.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", PADDING)
def test_is_as_near_to_fp64_as_transformers(resampler, padding, dtype):
    resampler = resampler.bfloat16().float()
    truth, before = (results(resampler, padding, one) for one in (torch.float64, dtype))
    report = patch(resampler, ops=["cross_attention"])
    assert len(report.replaced) == 3
    after = results(resampler, padding, dtype)
    assert not report.fallbacks()
    for mine, other, right in zip(after, before, truth, strict=True):
        assert distance(mine, right) <= allowed(distance(other, right), dtype)


def test_what_stands_in_padding_does_not_count(resampler):
    patch(resampler, ops=["cross_attention"])
    first, second = (results(resampler, "right and below", torch.float32, value) for value in (0.0, 1e3))
    assert torch.equal(first[0], second[0])
    assert not second[1][0, [2, 5, 6, 7, 8]].any()


def test_padding_of_all_images_is_not_projected(resampler):
    """The images of four and five patches of nine, behind which the four latents stand."""
    patch(resampler, ops=["cross_attention"])
    seen = []
    resampler.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    results(resampler, "of all", torch.float32)
    assert seen == [4 + 4]


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda a, k: k.update(attention_mask=torch.ones(2, 1, 4, 12, dtype=torch.bool)), "its mask is (2, 1, 4, 12)"),
        (lambda a, k: setattr(a.config, "_attn_implementation", "eager"), "eager attention was asked for"),
        (lambda a, k: setattr(a, "is_causal", True), "it is causal, or has a cache"),
        (lambda a, k: k.update(position_bias=draw(2, 4, 4, 13)), "it is called with options of SDPA, or a cache"),
        (lambda a, k: setattr(a.train(), "attention_dropout", 0.1), "dropout in training"),
    ],
)  # fmt: skip
def test_what_the_operator_cannot_do_runs_transformers(resampler, change, reason):
    attention = resampler.layers[0].self_attn
    given = {"latents": draw(2, 4, 48), "context": draw(2, 9, 48, seed=2), "attention_mask": None}
    change(attention, given)
    said = []
    report = None
    for patched in (False, True):
        if patched:
            report = patch(attention, ops=["cross_attention"])
        torch.manual_seed(0)
        try:
            said.append(attention(**given)[0])
        except Exception as error:
            said.append(type(error))
    assert said[0] is said[1] or torch.equal(said[0], said[1])
    assert report.fallbacks()[""] == {f"cross_attention: {reason}": 1}


def test_another_shape_of_mask_runs_transformers():
    module = idefics2().model.connector.perceiver_resampler
    assert "its mask is" in PaddingFirst.unsupported(module, draw(2, 9, 48), torch.ones(2, 8))
    assert PaddingFirst.unsupported(module, draw(2, 9, 48), torch.ones(2, 9)) is None


def test_what_no_operator_takes_is_left(resampler):
    attention = resampler.layers[0].self_attn
    assert ResamplerAttention.refuses(attention) is None
    attention.head_dim = 160
    assert "160 wide" in ResamplerAttention.refuses(attention)
    del attention.q_proj
    assert "no q_proj" in ResamplerAttention.refuses(attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_left_by_default(resampler, dtype):
    left = [row.reason for row in patch(resampler.to(dtype)).left if row.op == "cross_attention"]
    assert left == ["putting padding in order costs a CPU more than its mask"] * 3
