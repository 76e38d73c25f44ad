from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmllm.data.packer import LANES, LOOKAHEAD, Budget, Packer, Packing, Size
from fastmllm.data.packing_journal import EVERY, Filled, Journal
from fastmllm.data.shard_index import Skipped

MOST = 4  # visual tokens an image


def size_of(draw: int) -> Size | Skipped:
    """Return a usual mix: text alone, an image, several; some that fit nowhere, and some that cannot be read."""
    random = np.random.default_rng(draw)
    kind = random.random()
    if kind < 0.04:
        return Skipped(shard="s", key=str(draw), reason="unusable text", detail="")
    if kind < 0.08:
        return Size(200, 0) if kind < 0.06 else Size(4, 9)
    return Size(int(random.integers(3, 60)), int(random.choice([0, 1, 1, 3])))


def each(index: int) -> int:
    return (1, MOST)[index % 3 == 0]


def packer(lanes: int = 3, journal: Journal | None = None, size=size_of, images: int = 4) -> Packer:
    return Packer(
        size, Budget(max_tokens=128, max_images=images), lanes=lanes, tokens_an_image=each, most_tokens_an_image=MOST,
        name=lambda draw: ("s", str(draw)), journal=journal,
    )  # fmt: skip


def usable(draw: int) -> bool:
    size = size_of(draw)
    return isinstance(size, Size) and size.text + MOST * size.images <= 128 and size.images <= 4


@pytest.mark.parametrize("lanes", [1, 3])
def test_each_sample_has_one_place_within_budgets_and_bounds(lanes: int) -> None:
    made, rounds = packer(lanes), 200
    for lane in range(lanes):
        filled = [made(lane + lanes * turn) for turn in range(rounds)]
        for one in filled:
            sizes = [size_of(draw) for draw in one.draws]
            assert one.draws
            assert sum(s.text + s.images * each(one.index) for s in sizes) <= 128
            assert sum(s.images for s in sizes) <= 4
        order = [draw for one in filled for draw in one.draws]
        assert len(set(order)) == len(order)
        pulled = range(lane, filled[-1].pulled * lanes, lanes)
        assert sorted([*order, *filled[-1].waiting]) == [draw for draw in pulled if usable(draw)]
        left = [item for one in filled for item in one.skipped]
        assert [int(item.key) for item in left] == [draw for draw in pulled if not usable(draw)]
        assert {item.reason for item in left} == {"unusable text", "larger than the budget"}
        # nobody waits for more than LOOKAHEAD micro-batches, nobody passes more than LOOKAHEAD others
        entered = {draw: turn for turn, one in reversed(list(enumerate(filled))) for draw in (*one.draws, *one.waiting)}
        gone = {draw: turn for turn, one in enumerate(filled) for draw in one.draws}
        assert max(gone[draw] - entered[draw] for draw in gone) <= LOOKAHEAD
        ranked = {draw: place for place, draw in enumerate(sorted(order))}
        assert max(ranked[draw] - place for place, draw in enumerate(order)) <= LOOKAHEAD


def test_budgets_are_filled() -> None:
    """Against one sample after the other, as they come, until one does not fit."""

    def text(draw: int) -> Size:
        return Size(int(np.random.default_rng(draw).integers(3, 60)), 0)

    made = packer(1, size=text)
    share = np.mean([sum(text(d).text for d in made(i).draws) for i in range(300)]) / 128
    next_fit, room = 1, 128
    for draw in range(2000):
        if text(draw).text > room:
            next_fit, room = next_fit + 1, 128
        room -= text(draw).text
    plain = sum(text(draw).text for draw in range(2000)) / next_fit / 128
    assert plain < 0.85
    assert share > 0.97


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_a_micro_batch_is_a_function_of_its_number(order: list[int], lanes: int) -> None:
    straight, jumping = packer(lanes), packer(lanes)
    known = [straight(index) for index in range(61)]
    assert [jumping(index) for index in order] == [known[index] for index in order]


def test_a_journal_saves_the_way_and_changes_nothing(tmp_path: Path) -> None:
    lanes, asked = 2, []

    def counted(draw: int) -> Size | Skipped:
        asked.append(draw)
        return size_of(draw)

    straight = packer(lanes)
    known = [straight(index) for index in range(101)]
    for rank in range(2):  # each rank writes its own
        journal = Journal(tmp_path, rank, lanes, "me")
        for filled in known[rank:100:2]:
            journal.note(filled)
    lines = (tmp_path / "packing-0.jsonl").read_text().splitlines()
    assert len(lines) == -(-50 // EVERY)
    with (tmp_path / "packing-1.jsonl").open("a") as file:
        file.write('{"of": "me", "index": 99, "pul')  # killed here
    for identity, fewer in (("me", True), ("other", False)):
        asked.clear()
        again = packer(lanes, Journal(tmp_path, 0, lanes, identity), counted)
        assert [again(index) for index in (99, 100)] == known[99:]
        looked_again = len([draw for draw in asked if draw < lanes * known[0].pulled])
        assert (looked_again == 0) == fewer


def test_a_journal_that_cannot_be_written_costs_time(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file", 0, 1, "me")
    journal.note(Filled(index=0))
    journal.note(Filled(index=EVERY))
    assert capsys.readouterr().err.count("resuming will take longer") == 1


def test_what_comes_behind_fits_too() -> None:
    made = packer(3)
    behind = list(made.behind(4))[:20]
    assert all(draw % 3 == 1 and usable(draw) for draw in behind)
    assert min(behind) >= made(4).pulled * 3


def test_nothing_usable_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"256 samples in a row are unusable for micro-batch 2; .* raise max_tokens"):
        packer(size=lambda draw: Size(129, 0))(2)
    with pytest.raises(ValueError, match="at least 1 position"):
        Budget(max_tokens=0)


def test_the_order_has_an_identity() -> None:
    def identity(tokens: int = 9, images: int = 0, counts=each) -> tuple[int, ...]:
        packing = Packing(
            budget=Budget(max_tokens=tokens, max_images=images), size_of=lambda s: Size(1, 0), tokens_an_image=counts,
            most_tokens_an_image=MOST,
        )  # fmt: skip
        assert packing.packer(size_of, lambda draw: ("", ""), 3).lanes == 3 * LANES
        return packing.identity()

    assert len({identity(), identity(8), identity(images=1), identity(counts=lambda i: 1)}) == 4
