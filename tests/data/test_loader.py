from __future__ import annotations

import json
import pickle
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_shards import captions, talk, write_tar

from fastmllm.data.balance import BatchPlan
from fastmllm.data.loader import Loader
from fastmllm.data.packing import Batch, join
from fastmllm.data.rows import Row, prepare
from fastmllm.data.sample import Conversation
from fastmllm.data.shards import ShardSource, SourceConfig
from fastmllm.data.stream import Drawn, Stream
from fastmllm.data.text import TextError

MODES = {"drawn": 0, "arranged": 2}


def tokens(sizes: tuple[tuple[int, int], ...]) -> int:
    return sum(width * height for width, height in sizes)


def batch_of(drawn: Drawn[Row]) -> Batch:
    return join(drawn.items)


def row_of(sample: Conversation, index: int, tokenizer) -> Row:
    return prepare(sample, tokenizer, num_visual_tokens=2 + index % 2, image_size=4, image_token_id=299)


def names(drawn: Drawn[Conversation]) -> list[str]:
    return [sample.id for sample in drawn.items]


def identical(sample: Conversation, index: int) -> Conversation:
    return sample


def sources(folder: Path) -> list[ShardSource]:
    """Captions in shards, by weight 2, and talks without images and a corrupt record, by weight 1."""
    shards = captions(folder, shards=4, each=5, size=(6, 4))
    texts = [(f"{i}.json", talk(f"hello {i}", "hi", "and?", "bye") if i != 3 else b"{") for i in range(7)]
    tar = write_tar(folder / "texts.tar", texts)
    given = (("pictures", shards, 2.0), ("texts", str(tar), 1.0))
    return [
        ShardSource(SourceConfig(name=name, path=path, weight=weight, block_shards=2), cache=folder / "cache")
        for name, path, weight in given
    ]


def loader(folder: Path, *, rank: int = 0, ranks: int = 2, workers: int = 0, window: int = 0) -> Loader:
    plan = BatchPlan(batch_size=3, micro_batches=2, ranks=ranks, window=window, seed=4)
    return Loader(Stream(sources(folder), identical, plan, cost=tokens), names, rank=rank, workers=workers)


def take(loader: Loader, num: int) -> list[list[str]]:
    taken = [next(loader) for _ in range(num)]
    loader.close()
    return taken


@pytest.mark.parametrize("window", MODES.values(), ids=MODES)
def test_two_ranks_of_two_workers_see_what_one_process_sees(tmp_path: Path, window: int) -> None:
    alone = take(loader(tmp_path, ranks=1, window=window), 20)
    ranks = [take(loader(tmp_path, rank=rank, workers=2, window=window), 10) for rank in range(2)]
    both = [batch for step in zip(*ranks, strict=True) for batch in step]
    pictures = [name for batch in both for name in batch if name.startswith("pictures")]
    if not window:
        assert len(set(pictures[:20])) == len(set(pictures[20:40])) == 20  # an epoch over all ranks and workers
    if window:  # a step has the same micro-batches, the heavier one anywhere
        alone, both = ([sorted(of[i : i + 2]) for i in range(0, 20, 2)] for of in (alone, both))
    assert both == alone


@pytest.mark.parametrize("window", MODES.values(), ids=MODES)
@pytest.mark.parametrize("workers", [(0, 0), (2, 0), (1, 2)])
def test_ten_and_a_restart_and_ten_are_twenty(tmp_path: Path, workers: tuple[int, int], window: int) -> None:
    twenty = take(loader(tmp_path, rank=1, window=window), 20)
    first = loader(tmp_path, rank=1, workers=workers[0], window=window)
    before = [next(first) for _ in range(10)]
    state = json.loads(json.dumps(first.state_dict()))  # the workers are ahead of it
    first.close()
    second = loader(tmp_path, rank=1, workers=workers[1], window=window)
    second.load_state_dict(state)
    assert before + take(second, 10) == twenty
    assert second.state_dict()["index"] == 40
    assert state["sources"].keys() == {"pictures", "texts"}


def test_a_state_of_two_ranks_goes_on_with_one(tmp_path: Path) -> None:
    twenty = take(loader(tmp_path, ranks=1), 20)
    two = [loader(tmp_path, rank=rank) for rank in range(2)]
    before = [next(of) for _ in range(5) for of in two]
    one = loader(tmp_path, ranks=1)
    one.load_state_dict(two[1].state_dict())
    assert before + take(one, 10) == twenty


def test_a_trainer_may_ask_for_any_batch_and_its_random_numbers_stay(tmp_path: Path) -> None:
    made = loader(tmp_path, workers=2)
    state = torch.get_rng_state()
    forward = [made.at(index) for index in (0, 2, 4)]
    assert [made.at(index) for index in (2, 4, 0)] == [forward[1], forward[2], forward[0]]
    made.close()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_skipped_reaches_the_process_that_logs(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(talk("a", "b<|im_end|>" if i == 2 else "b")) for i in range(4)))

    stream = Stream(
        [ShardSource(SourceConfig(name="a", path=str(path)), cache=tmp_path)], refuse, BatchPlan(batch_size=2)
    )
    seen: list[Drawn[None]] = []
    made = Loader(stream, names, workers=1, on_batch=seen.append)
    take(made, 2)
    assert [d.index for d in seen] == [0, 1]
    assert [(s.key, s.reason) for d in seen for s in d.skipped] == [("2", "unusable text")]
    assert all(d.items == [] for d in seen)


def refuse(sample: Conversation, index: int) -> Conversation:
    if "<|" in sample.turns[0].answer:
        raise TextError("a special token")
    return sample


def test_batches_of_tokens_and_pixels_come_from_workers(tokenizer, tmp_path: Path) -> None:
    load = partial(row_of, tokenizer=tokenizer)
    plan = BatchPlan(batch_size=3, seed=4)
    made = Loader(Stream(sources(tmp_path), load, plan, cost=tokens), batch_of, workers=2)
    batches = [next(made) for _ in range(6)]
    made.close()
    wanted = take(Loader(Stream(sources(tmp_path), identical, plan), names), 6)
    assert [batch.ids for batch in batches] == wanted
    for index, batch in enumerate(batches):
        pictures = [name for name in batch.ids if name.startswith("pictures")]
        assert len(batch.image_index) == (2 + index % 2) * len(pictures)
        assert (0 if batch.pixels is None else len(batch.pixels)) == len(pictures)
        talks = len(batch.ids) - len(pictures)
        end = tokenizer.token_to_id("<|im_end|>")
        assert (batch.labels == end).sum() == len(pictures) + 2 * talks  # each answer of a talk is learned


def test_what_a_worker_gets_does_not_grow_with_the_data(tmp_path: Path) -> None:
    sizes = []
    for each in (5, 500):
        made = ShardSource(
            SourceConfig(name="a", path=captions(tmp_path / str(each), shards=2, each=each)), cache=tmp_path / "cache"
        )
        stream = Stream([made], identical, BatchPlan(batch_size=2))
        stream(0)
        sizes.append(len(pickle.dumps(stream)))
        assert sys.getsizeof(made.shards) < 200
    assert sizes[1] < sizes[0] + 50


def test_a_wrong_state_is_refused(tmp_path: Path) -> None:
    made = loader(tmp_path)
    next(made)
    state = made.state_dict()
    with pytest.raises(ValueError, match="of another stream"):
        loader(tmp_path, window=2).load_state_dict(state)
    three = Loader(Stream(sources(tmp_path), identical, BatchPlan(batch_size=3, micro_batches=3, ranks=3)), names)
    with pytest.raises(ValueError, match="of another stream"):
        three.load_state_dict(state)
    with pytest.raises(ValueError, match="no whole rounds of 2 on 2 ranks"):
        made.load_state_dict(state | {"index": 3, "ranks": 1})
    with pytest.raises(ValueError, match="rank 2 of 2"):
        loader(tmp_path, rank=2)
