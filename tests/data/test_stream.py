from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import captions, png, write_tar

from fastmllm.data.balance import BatchPlan, spread
from fastmllm.data.images import open_image
from fastmllm.data.sample import Conversation
from fastmllm.data.shards import ShardSource, SourceConfig
from fastmllm.data.stream import Stream
from fastmllm.data.text import TextError


def load(sample: Conversation, index: int) -> str:
    for image in sample.images:
        open_image(image)
    if "unreadable" in sample.turns[0].answer:
        raise TextError("not in the vocabulary")
    return f"{sample.source}:{sample.turns[0].answer}"


def tokens(sizes: tuple[tuple[int, int], ...]) -> int:
    return sum(width * height for width, height in sizes)


def stream(tmp_path: Path, plan: BatchPlan, **weights: float | None) -> Stream[str]:
    sources = []
    for name, weight in weights.items():
        path = captions(tmp_path / name, shards=3, each=7)
        config = SourceConfig(name=name, path=path, weight=weight, block_shards=2)
        sources.append(ShardSource(config, cache=tmp_path / "cache"))
    return Stream(sources, load, plan, cost=tokens)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_over_ranks_has_every_sample_once(tmp_path: Path, ranks: int) -> None:
    made = stream(tmp_path, BatchPlan(batch_size=2, micro_batches=ranks, ranks=ranks), a=None)
    of_ranks = [[item for i in range(rank, 42, ranks) for item in made(i).items] for rank in range(ranks)]
    assert set(Counter(item for items in of_ranks for item in items).values()) == {4}  # 84 draws, 21 samples
    drawn = [item for i in range(42) for item in made(i).items]
    for epoch in range(4):
        assert len(set(drawn[epoch * 21 : epoch * 21 + 21])) == 21  # batches of 2 reach over its end


def test_weights_and_state(tmp_path: Path) -> None:
    made = stream(tmp_path, BatchPlan(batch_size=10), a=3.0, b=1.0)
    drawn = [item for i in range(200) for item in made(i).items]
    assert Counter(item[0] for item in drawn) == {"a": 1500, "b": 500}
    assert made.state(200)["sources"] == {"a": {"epoch": 71, "position": 9}, "b": {"epoch": 23, "position": 17}}
    start = made.state(37)["sources"]
    at = {name: place["epoch"] * 21 + place["position"] for name, place in start.items()}
    assert Counter(item[0] for item in drawn[:370]) == at
    sizes = stream(tmp_path, BatchPlan(batch_size=10), a=None, b=None)
    assert Counter(item[0] for i in range(100) for item in sizes(i).items) == {"a": 500, "b": 500}


def test_the_identity_is_of_the_order(tmp_path: Path) -> None:
    base = stream(tmp_path, BatchPlan(batch_size=2, micro_batches=2), a=None).identity()
    same = BatchPlan(batch_size=2, micro_batches=2, ranks=2)
    assert stream(tmp_path, same, a=None).identity() == base
    others = [
        stream(tmp_path, BatchPlan(batch_size=3, micro_batches=2), a=None),
        stream(tmp_path, BatchPlan(batch_size=2, micro_batches=2, seed=1), a=None),
        stream(tmp_path, BatchPlan(batch_size=2, micro_batches=2, window=1), a=None),
        stream(tmp_path, BatchPlan(batch_size=2, micro_batches=2, window=2), a=None),
        stream(tmp_path, BatchPlan(batch_size=2, micro_batches=2), b=None),
        stream(tmp_path, BatchPlan(batch_size=2, micro_batches=2), a=1.0, b=2.0),
    ]
    assert len({base, *(other.identity() for other in others)}) == 7


def damaged(tmp_path: Path, bad: set[int], num: int = 12) -> ShardSource:
    """A shard of captions whose `bad` ones have an image that is cut short, behind its header, or no good text."""
    members: list[tuple[str, bytes]] = []
    for i in range(num):
        picture = png(i, (40, 40))
        members.append((f"{i}.png", picture[:-30] if i in bad and i % 2 else picture))
        members.append((f"{i}.txt", b"unreadable" if i in bad and not i % 2 else f"{i}".encode()))
    shard = write_tar(tmp_path / "a.tar", members)
    return ShardSource(SourceConfig(name="a", path=str(shard)), cache=tmp_path / "cache")


def test_a_corrupt_sample_leaves_its_place_empty(tmp_path: Path) -> None:
    whole = Stream([damaged(tmp_path / "whole", set())], load, BatchPlan(batch_size=3))
    torn = Stream([damaged(tmp_path / "torn", {3, 8})], load, BatchPlan(batch_size=3))
    skipped = []
    for index in range(8):
        wanted, found = whole(index), torn(index)
        assert found.items == [item for item in wanted.items if item not in ("a:3", "a:8")]
        assert found.scored
        skipped += found.skipped
    shard = str(tmp_path / "torn" / "a.tar")
    assert {(s.shard, s.key, s.reason) for s in skipped} == {
        (shard, "3", "undecodable image"),
        (shard, "8", "unusable text"),
    }
    assert len(skipped) == 4  # once in each of two epochs
    assert all(s.detail for s in skipped)
    assert torn(5) == torn(5)


def test_what_was_left_out_while_indexing_is_listed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("a.png", png()), ("a.txt", b"x"), ("b.json", b"{"), ("c.png", b"")])
    made = Stream([ShardSource(SourceConfig(name="a", path=str(shard)))], load, BatchPlan(batch_size=1))
    assert [(s.shard, s.key, s.reason) for s in made.skipped()] == [
        (str(shard), "b", "wrong JSON"),
        (str(shard), "c", "no text"),
    ]


def test_a_micro_batch_of_nothing_has_a_stand_in(tmp_path: Path) -> None:
    made = Stream([damaged(tmp_path / "torn", {3, 8})], load, BatchPlan(batch_size=1, micro_batches=4))
    drawn = [made(index) for index in range(12)]
    assert [d.scored for d in drawn] == [not d.skipped for d in drawn]
    assert [d.scored for d in drawn].count(False) == 2
    assert all(len(d.items) == 1 for d in drawn)
    assert len({d.items[0] for d in drawn if d.scored}) == 10
    step = Stream(made.sources, load, BatchPlan(batch_size=1))
    alone = [step(index) for index in range(12)]
    assert [d.items for d in alone] == [d.items for d in drawn]
    assert all(d.scored for d in alone)  # a step needs something to learn from
    hopeless = Stream([damaged(tmp_path / "hopeless", set(range(12)))], load, BatchPlan(batch_size=1))
    with pytest.raises(ValueError, match=r"micro-batch 0 and 256 samples behind it are unusable; the last: .*a\.tar"):
        hopeless(0)


def test_a_window_of_one_step_keeps_its_samples_and_evens_the_ranks_out(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sides = np.where(generator.random(96) < 0.8, 2, 14)
    members = [m for i, side in enumerate(sides) for m in ((f"{i}.png", png(i, (side, side))), (f"{i}.txt", b"%d" % i))]
    shard = write_tar(tmp_path / "a.tar", members)
    source = ShardSource(SourceConfig(name="a", path=str(shard)), cache=tmp_path / "cache")
    spreads = {}
    steps: dict[int, list[list[str]]] = {}
    for window in (0, 1, 4):
        plan = BatchPlan(batch_size=4, micro_batches=4, ranks=4, window=window)
        made = Stream([source], load, plan, cost=tokens)
        drawn = [[made(step * 4 + rank) for rank in range(4)] for step in range(12)]
        assert all(d.work == sum(int(sides[int(i[2:])]) ** 2 for i in d.items) for step in drawn for d in step)
        assert [made.spread(i) for i in range(12)] == [spread([d.work for d in step]) for step in drawn]
        spreads[window] = np.mean([spread([d.work for d in step]) for step in drawn])
        steps[window] = [sorted(item for d in step for item in d.items) for step in drawn]
        again = Stream([source], load, plan, cost=tokens)
        assert [again(i) for i in (47, 3, 20)] == [drawn[i // 4][i % 4] for i in (47, 3, 20)]
    assert steps[0] == steps[1] != steps[4]
    for first in range(0, 12, 4):  # a window of four has the samples of its four steps
        assert sorted(chain(*steps[4][first : first + 4])) == sorted(chain(*steps[0][first : first + 4]))
    assert spreads[0] > 0.7
    assert spreads[1] < 0.6 * spreads[0]
    assert spreads[4] < 0.3 * spreads[0]


def test_bad_streams(tmp_path: Path) -> None:
    plan = BatchPlan(batch_size=1)
    with pytest.raises(ValueError, match="give all sources one, or none"):
        stream(tmp_path, plan, a=1.0, b=None)
    with pytest.raises(ValueError, match="distinct names"):
        Stream([], load, plan)
    with pytest.raises(ValueError, match="give `cost`"):
        Stream([damaged(tmp_path, set())], load, BatchPlan(batch_size=1, window=1))


def test_full_micro_batches_of_a_step_hold_no_sample_twice(tmp_path: Path) -> None:
    """A torn image and unreadable texts give way to samples of later steps, other ones in every micro-batch."""
    members = [
        member
        for i in range(60)
        for member in ((f"{i:02}.png", png(i)), (f"{i:02}.txt", f"{'unreadable ' * (i % 4 == 1)}{i}".encode()))
    ]
    write_tar(tmp_path / "s.tar", members)
    source = ShardSource(SourceConfig(name="s", path=str(tmp_path / "s.tar")), cache=tmp_path / "cache")
    plan = BatchPlan(batch_size=4, micro_batches=4, ranks=2, full=True)
    whole, holes = Stream([source], load, plan), Stream([source], load, replace(plan, full=False))
    lost = 0
    for step in range(3):
        drawn = [whole(4 * step + number) for number in range(4)]
        items = [item for micro in drawn for item in micro.items]
        assert [len(micro.items) for micro in drawn] == [4] * 4
        assert len(set(items)) == 16
        for number, micro in enumerate(drawn):
            kept = holes(4 * step + number)
            assert micro.items[: len(kept.items)] == kept.items
            assert [item.key for item in micro.skipped] == [item.key for item in kept.skipped]
            lost += len(kept.skipped)
    assert lost > 6
    assert whole.identity() != holes.identity()
