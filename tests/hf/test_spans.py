"""Masks as one span a row: what they say, and what they cannot say."""

from __future__ import annotations

import pytest
import torch

from fastmllm.hf.fused.spans import spans


def mask_of(seen, dtype):
    """Return (B, 1, T, N) as a model makes it."""
    seen = torch.as_tensor(seen)[:, None]
    if dtype == torch.bool:
        return seen.bool()
    return torch.where(seen.bool(), 0.0, torch.finfo(dtype).min).to(dtype)


def by_hand(found):
    """Return the keys that each row of each sample sees, by its span and order."""
    start, stop, order, _ = found
    rows = []
    for b, sample in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        keys = range(10**6) if order is None else order[b].tolist()
        rows.append([sorted(keys[low:high]) for low, high in zip(*sample, strict=True)])
    return rows


def seen_by(mask):
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    return [[row.nonzero()[:, 0].tolist() for row in sample] for sample in seen]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_neighbours_keep_their_order(dtype):
    mask = mask_of([[[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]], dtype)
    for reorder in (False, True):
        found = spans(mask, reorder)
        assert found.order is None
        assert by_hand(found) == seen_by(mask)
        assert found.start.dtype == found.stop.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_padding_tiles_between_images_come_last(dtype):
    """Two images side by side, of two tiles and one out of three, then another; the first word sees everything."""
    tiles = torch.tensor([[[1] * 9, [1, 1, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 0]]] * 2)
    tiles[1, 1, 1] = 0
    mask = mask_of(tiles.repeat_interleave(4, -1), dtype)
    assert spans(mask, False) is None
    found = spans(mask, True)
    assert by_hand(found) == seen_by(mask)
    assert found.order.sort().values.tolist() == [list(range(36))] * 2


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        mask_of([[[1, 1, 0], [0, 0, 0]]], torch.float32),  # softmax would see everything
        mask_of([[[1, 1, 0], [0, 1, 1]]], torch.float32) / 2,
        mask_of([[[1, 1, 0], [0, 1, 1]]], torch.float32) + torch.tensor([0.0, 1.0, 0.0]),
        mask_of([[[1, 0, 1], [0, 1, 1], [1, 1, 0]]], torch.bool),  # in no order
    ],
    ids=["nothing seen", "not the lowest", "a bias", "all pairs"],
)
def test_what_spans_cannot_say(mask, reorder):
    assert spans(mask, reorder) is None


def test_the_lowest_number_and_infinity_are_unseen():
    mask = mask_of([[[1, 1, 0], [0, 1, 1]]], torch.float32)
    mask[0, 0, 0, 2] = -torch.inf
    assert by_hand(spans(mask, False)) == [[[0, 1], [1, 2]]]


def test_reads_a_mask_once_until_it_is_written():
    mask = mask_of([[[1, 1, 0], [0, 1, 1]]], torch.float32)
    first = spans(mask, True)
    assert spans(mask, True) is first
    mask[0, 0, 0, 1] = torch.finfo(torch.float32).min
    assert by_hand(spans(mask, True)) == [[[0], [1, 2]]]
    holes = mask_of([[[1, 0, 1]]], torch.float32)
    assert spans(holes, False) is None
    assert spans(holes, True) is not None
