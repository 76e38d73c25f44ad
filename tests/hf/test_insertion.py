"""Features at their placeholders."""

from __future__ import annotations

import pytest
import torch
from tiny_hf import IMAGE, draw
from tiny_hf_fusion import blip2, blip2_batch, idefics2, idefics3, pictures_batch, smolvlm
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


@pytest.mark.parametrize("features", [2, 3])
def test_models_that_do_not_count_take_what_fits(features):
    """BLIP-2 puts in as many features as there are placeholders, and leaves the others out."""
    model, batch = blip2().eval(), blip2_batch()
    batch["pixel_values"] = draw(features + 1, 3, 28, 28)
    batch["input_ids"][1] = batch["input_ids"][1].masked_fill(batch["input_ids"][1] == IMAGE, 7)
    expected = model(**batch).logits  # two images have a place
    patch(model, ops=["insert_features"])
    assert torch.equal(model(**batch).logits, expected)
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(RuntimeError, match="source < number of ones in mask"):
        model(**batch)


@pytest.mark.parametrize("build", [idefics2, idefics3, smolvlm])
def test_merging_too_many_features_is_left_to_transformers(build):
    model, batch = build().eval(), pictures_batch()
    batch["input_ids"][1] = batch["input_ids"][1].masked_fill(batch["input_ids"][1] == IMAGE, 7)

    def said():
        try:
            return model(**batch).logits
        except (ValueError, RuntimeError) as error:
            return str(error)

    expected = said()
    patch(model, ops=["insert_features"])
    found = said()
    assert torch.equal(found, expected) if torch.is_tensor(expected) else found == expected
