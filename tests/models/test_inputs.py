"""Batches of text with images: one placeholder or many, padding, labels, M-RoPE; what does not fit names its sample."""

from __future__ import annotations

import pytest
import torch

from fastmllm.models.inputs import make_inputs, unpad

IMAGE = 5


def test_repeated_placeholders_equal_single_ones():
    single = [[1, IMAGE, 2, IMAGE, 3], [4], [IMAGE, 6]]
    repeated = [[1, IMAGE, IMAGE, 2, IMAGE, IMAGE, IMAGE, 3], [4], [IMAGE, 6]]
    labels = [[-100, -100, -100, 2, -100, -100, -100, 3], [4], [-100, 6]]
    a = make_inputs(single, placeholders=[IMAGE], counts=[2, 3, 1], labels=[[-100, -100, 2, -100, 3], [4], [-100, 6]])
    b = make_inputs(repeated, placeholders=[IMAGE], counts=[2, 3, 1], labels=labels, expanded=True)
    assert a.num_samples == 3
    for name in ("source", "text_rows", "visual_rows", "input_ids", "labels", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(a.plan, name), getattr(b.plan, name)), name
    assert torch.equal(a.input_ids, torch.tensor([1, IMAGE, 2, IMAGE, 3, 4, IMAGE, 6]))
    assert a.plan.input_ids.tolist() == [t for s in repeated for t in s]
    assert a.plan.num_targets == 3  # the single token of the second sample predicts nothing


def test_images_may_stand_side_by_side():
    inputs = make_inputs([[IMAGE] * 5], placeholders=[IMAGE], counts=[2, 3], expanded=True)
    assert inputs.input_ids.tolist() == [IMAGE] * 2
    assert inputs.plan.visual_rows.tolist() == list(range(5))


def test_grids_give_mrope_positions_and_their_counts():
    inputs = make_inputs([[1, *[IMAGE] * 6, 2]], placeholders=[IMAGE], grids=[(1, 4, 6)], expanded=True)
    assert inputs.plan.position_ids.shape == (3, 8)
    assert inputs.plan.position_ids[1].tolist() == [0, 1, 1, 1, 2, 2, 2, 4]


@pytest.mark.parametrize(
    ("samples", "counts", "expanded", "message"),
    [
        ([[1, IMAGE], [IMAGE] * 3], [2, 2], True, "sample 0 has 1 image placeholders"),
        ([[1, IMAGE, IMAGE], [IMAGE] * 3], [2, 2], True, "sample 1 has 3 image placeholders"),
        (
            [[1, IMAGE, IMAGE], [IMAGE, 7, 1, IMAGE, IMAGE]],
            [2, 3],
            True,
            "sample 1: image 0 has 3 visual tokens, but only 1 placeholders side by side at token 0, the next at 3",
        ),
        ([[1, IMAGE]], [2, 2], False, "2 images are given, but the text has places for 1"),
        ([[1]], [2], True, "1 images are given, but the text has places for 0"),
    ],
)
def test_what_does_not_fit_is_named(samples, counts, expanded, message):
    with pytest.raises(ValueError, match=message):
        make_inputs(samples, placeholders=[IMAGE], counts=counts, expanded=expanded)


def test_padding_on_either_side_goes_and_inside_is_refused():
    ids = torch.tensor([[0, 0, 1, 2], [3, 4, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
    tokens, labels = unpad(ids, mask, ids + 10)
    assert tokens == [[1, 2], [3, 4]]
    assert labels == [[11, 12], [13, 14]]
    assert unpad(ids) == ([[0, 0, 1, 2], [3, 4, 0, 0]], None)
    with pytest.raises(ValueError, match="sample 1 has padding between"):
        unpad(ids, torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]]))
    with pytest.raises(ValueError, match=r"must all be \(B, L\)"):
        unpad(ids, mask[:, :2])
