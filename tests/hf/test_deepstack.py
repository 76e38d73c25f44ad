"""DeepStack: features added at visual tokens."""

from __future__ import annotations

import pytest
import torch
from operators_seen import Names
from tiny_hf_qwen import qwen3_vl

from fastmllm.hf import patch, unpatch
from fastmllm.hf.fused.deepstack import DeepStack


@pytest.fixture(scope="module")
def language():
    return qwen3_vl().model.language_model


def inputs(dtype=torch.float32):
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 5, 48, generator=generator).to(dtype).requires_grad_()
    return hidden, mask, torch.randn(4, 48, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_masked_sum(language, dtype):
    hidden, mask, embeds = inputs(dtype)
    expected = language._deepstack_process(hidden, mask, embeds)
    report = patch(language, ops=["insert_features"])
    found = [language._deepstack_process(hidden, mask, embeds) for _ in range(2)]
    unpatch(language)
    assert not report.fallbacks()
    up = torch.randn(expected.shape).to(dtype)
    theirs = torch.autograd.grad(expected, [hidden, embeds], up)
    for y in found:
        assert torch.equal(y, expected)  # one sum of two numbers, rounded once
        assert all(map(torch.equal, torch.autograd.grad(y, [hidden, embeds], up), theirs))


def test_a_mask_written_to_is_searched_anew(language):
    hidden, mask, embeds = inputs()
    patch(language, ops=["insert_features"])
    language._deepstack_process(hidden, mask, embeds)
    mask.copy_(mask.flip(1))
    found = language._deepstack_process(hidden, mask, embeds)
    unpatch(language)
    assert torch.equal(found, language._deepstack_process(hidden, mask, embeds))


def test_a_wrong_number_of_features_is_said_by_transformers(language):
    hidden, mask, embeds = inputs()
    patch(language, ops=["insert_features"])
    with pytest.raises((RuntimeError, IndexError)):
        language._deepstack_process(hidden, mask, embeds[:3])
    unpatch(language)


def test_no_place_is_looked_for_twice(language):
    """Three layers add to the same tokens: on a GPU a search of the mask is a pass over it, and a read."""
    hidden, mask, embeds = inputs()
    patch(language, ops=["insert_features"])
    with Names() as names:
        for _ in range(3):
            language._deepstack_process(hidden, mask, embeds)
    unpatch(language)
    assert [name for name in names.seen if "nonzero" in name] == ["aten::nonzero_static"]


def test_a_mask_of_another_kind_is_left(language):
    hidden, mask, embeds = inputs()
    assert DeepStack.unsupported(language, hidden, mask, embeds) is None
    for other in (mask.int(), mask[:, :4], mask[..., None].expand(-1, -1, 48)):
        assert "its mask is" in DeepStack.unsupported(language, hidden, other, embeds)
