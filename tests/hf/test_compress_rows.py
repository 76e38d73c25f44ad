"""Which columns of a text are left: `shorten`, `Rows`."""

from __future__ import annotations

import pytest
import torch

from fastmllm.hf.compress.rows import PAD, Images, shorten

IDS = torch.tensor([[1, 5, 5, 5, 9, 5, 5, 0], [1, 2, 3, 4, 5, 5, 5, 6]])
IMAGES = Images((3, 2, 3), (1, 2, 2))
MASK = (IDS != 0).long()


def test_rows_lose_the_first_placeholders_and_are_padded_anew():
    rows = shorten(IDS, 5, IMAGES, mask=MASK, left=False)
    assert rows.index.tolist() == [[0, 3, 4, 5, 6, PAD, PAD], [0, 1, 2, 3, 5, 6, 7]]
    assert rows.owners == (0, 0, 1)
    left = shorten(IDS, 5, IMAGES, mask=MASK, left=True)
    assert left.index.tolist() == [[PAD, PAD, 0, 3, 4, 5, 6], [0, 1, 2, 3, 5, 6, 7]]
    assert left.take(IDS, 0).tolist() == [[0, 0, 1, 5, 9, 5, 5], [1, 2, 3, 4, 5, 5, 6]]
    assert left.mask(MASK).tolist() == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]


def test_tokens_stand_where_a_plan_says():
    images = Images((3, 2, 3), (1, 2, 2), torch.tensor([1, 1, 0, 0, 2]))
    rows = shorten(IDS, 5, images, mask=MASK, left=False)
    assert rows.stands.tolist() == [[0, 2, 4, 6, 5, PAD, PAD], [0, 1, 2, 3, 4, 6, 7]]
    assert rows.index.tolist() == shorten(IDS, 5, IMAGES, mask=MASK, left=False).index.tolist()
    positions = torch.arange(8).expand(3, 2, 8)
    assert rows.standing(positions)[2].tolist() == [[0, 2, 4, 6, 5, 0, 0], [0, 1, 2, 3, 4, 6, 7]]


def test_tiles_may_keep_more_than_the_text_had_places_for():
    rows = shorten(IDS, 5, Images((3, 2, 3), (4, 1, 3)), mask=MASK, left=False)
    assert rows.take(IDS, 0).tolist() == [[1, 5, 5, 5, 5, 9, 5, 0], [1, 2, 3, 4, 5, 5, 5, 6]]


def test_what_a_cache_holds_is_counted_along():
    cached = torch.tensor([[PAD, 0], [0, 2]])
    rows = shorten(IDS, 5, IMAGES, mask=MASK, left=True, past=3, cached=cached)
    assert rows.whole.tolist() == [[PAD, 0, PAD, PAD, 3, 6, 7, 8, 9], [0, 2, 3, 4, 5, 6, 8, 9, 10]]
    assert rows.take(IDS, 0).tolist() == [[0, 0, 1, 5, 9, 5, 5], [1, 2, 3, 4, 5, 5, 6]]
    known = torch.tensor([[0, 1, 1], [1, 1, 1]])
    seen = [[0, 0, 0, 0, 1, 1, 1, 1, 1], [1] * 9]
    assert rows.mask(torch.cat([known, MASK], 1)).tolist() == seen  # of the conversation
    assert rows.mask(torch.cat([torch.tensor([[0, 0], [1, 1]]), MASK], 1)).tolist() == seen  # of the cache as it is
    assert rows.mask(None).tolist() == (rows.whole != PAD).long().tolist()


def test_positions_close_up():
    rows = shorten(IDS, 5, IMAGES, mask=MASK, left=False)
    assert rows.renumbered(torch.arange(8)[None]).tolist() == [[0, 1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 4, 5, 6]]
    from_one = torch.arange(1, 9)[None]  # as PaliGemma counts
    assert rows.renumbered(from_one)[1].tolist() == [1, 2, 3, 4, 5, 6, 7]
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    images = Images((3, 2), (1, 1))
    assert shorten(IDS[:1], 5, images, mask=None, left=False).renumbered(packed).tolist() == [[0, 1, 0, 1, 2]]


def test_placeholders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="tokens: 8, features: 7"):
        shorten(IDS, 5, Images((3, 2, 2), (1, 1, 1)), mask=None, left=False)
    with pytest.raises(ValueError, match="two rows"):
        shorten(IDS, 5, Images((3, 5), (1, 1)), mask=None, left=False)
