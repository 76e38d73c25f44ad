"""Features at their placeholders."""

from __future__ import annotations

import pytest
import torch
from tiny_hf_llava import llava, llava_batch

from fastmllm.hf import patch
from fastmllm.hf.fused.insertion import Places


def test_places_scatter_and_are_a_mask_otherwise():
    mask = torch.tensor([[False, True, True], [True, False, False]])[..., None]
    places = mask.as_subclass(Places)
    embeddings, features = torch.randn(2, 3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    expected = embeddings.masked_scatter(mask, features)
    found = embeddings.masked_scatter(places, features)
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)
    up = torch.randn(2, 3, 4)
    for ours, theirs in zip(
        torch.autograd.grad(found, [embeddings, features], up),
        torch.autograd.grad(expected, [embeddings, features], up),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    joined = places[..., 0] | places[..., 0]  # Qwen3-VL's DeepStack goes on with the mask
    assert type(joined) is torch.Tensor
    assert torch.equal(joined, mask[..., 0])
    assert torch.equal(embeddings[joined], embeddings[mask[..., 0]])


def test_a_wrong_number_of_placeholders_is_said_by_transformers():
    model, batch = llava(), llava_batch()
    batch["pixel_values"] = batch["pixel_values"][:2]
    patch(model, ops=["insert_features"])
    with pytest.raises(ValueError, match="do not match"):
        model(**batch)
