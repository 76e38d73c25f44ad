from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmllm.data.order import BlockShuffle

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(sum)


@given(sizes=SIZES, block=st.integers(1, 6), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation_read_anywhere(sizes: list[int], block: int, seed: int) -> None:
    order = BlockShuffle(sizes, seed=seed, name="a", block_shards=block)
    wanted = [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]
    n = len(wanted)
    forward = [order[draw] for draw in range(2 * n)]
    assert sorted(forward[:n]) == sorted(forward[n:]) == wanted
    fresh = pickle.loads(pickle.dumps(order))
    assert [fresh[draw] for draw in reversed(range(2 * n))] == forward[::-1]


def test_a_block_touches_few_shards_and_mixes_them() -> None:
    order = BlockShuffle([10] * 12, seed=1, name="a", block_shards=3)
    blocks = [{order[draw][0] for draw in range(start, start + 30)} for start in range(0, 120, 30)]
    assert [len(block) for block in blocks] == [3, 3, 3, 3]
    assert set.union(*blocks) == set(range(12))
    assert len({order[draw][0] for draw in range(8)}) > 1  # not shard by shard
    assert blocks != [{order[120 + d][0] for d in range(start, start + 30)} for start in range(0, 120, 30)]
    assert [order[d] for d in range(9)] != [BlockShuffle([10] * 12, seed=2, name="a")[d] for d in range(9)]
    assert [order[d] for d in range(9)] != [BlockShuffle([10] * 12, seed=1, name="b")[d] for d in range(9)]


def test_one_block_is_shuffled_anew_each_epoch() -> None:
    order = BlockShuffle([20], seed=1, name="a")
    assert len({tuple(order[e * 20 + d] for d in range(20)) for e in range(5)}) == 5


def test_nothing_to_order() -> None:
    for sizes, block in (([0, 0], 1), ([1], 0)):
        with pytest.raises(ValueError, match="order of 'a'"):
            BlockShuffle(sizes, seed=0, name="a", block_shards=block)
