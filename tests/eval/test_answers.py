"""Answers on disk: resumed, shared by ranks, and never another question's."""

from __future__ import annotations

import pytest

from fastmllm.data.sample import Sample
from fastmllm.eval.answers import BLOCK, AnswerLog, Ranks

SAMPLES = [Sample(id=f"q{i}", prompt=f"What is {i}?", answer=str(i), task="name") for i in range(3 * BLOCK + 5)]
RIGHT = [s.answer for s in SAMPLES]


class Asked:
    """Answers, and remembers the blocks."""

    def __init__(self, stop=None):
        self.blocks, self.stop = [], stop

    def __call__(self, samples):
        if len(self.blocks) == self.stop:
            raise KeyboardInterrupt
        self.blocks.append([s.id for s in samples])
        return [s.answer for s in samples]


def _collect(folder, ask, samples=SAMPLES, **more):
    log = AnswerLog(folder, **more)
    return log, log.collect("name", "wrong image", samples, ask)


def test_an_interrupted_run_asks_only_the_rest_in_the_same_blocks(tmp_path):
    whole = Asked()
    _collect(None, whole)
    first = Asked(stop=2)
    with pytest.raises(KeyboardInterrupt):
        _collect(tmp_path, first)
    path = tmp_path / "name.wrong_image.0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:BLOCK]) + lines[BLOCK][:10])  # killed while it wrote: a half line
    second = Asked()
    log, answers = _collect(tmp_path, second)
    assert answers == RIGHT
    assert second.blocks == whole.blocks[1:]  # what is computed together is what it would have been
    assert len(log.damaged) == 1
    third = Asked()
    assert _collect(tmp_path, third)[1] == RIGHT
    assert third.blocks == []


def test_ranks_ask_their_blocks_and_all_get_every_answer(tmp_path):
    asks = [Asked(), Asked()]

    def other():
        AnswerLog(tmp_path, ranks=Ranks(1, 2)).collect("name", "wrong image", SAMPLES, asks[1])

    first = AnswerLog(tmp_path, ranks=Ranks(0, 2, barrier=other))  # rank 1 works until the barrier
    assert first.collect("name", "wrong image", SAMPLES, asks[0]) == RIGHT
    whole = Asked()
    _collect(None, whole)
    assert asks[0].blocks == whole.blocks[0::2]
    assert asks[1].blocks == whole.blocks[1::2]
    alone = Asked()
    assert _collect(tmp_path, alone)[1] == RIGHT  # another number of ranks goes on with all files
    assert alone.blocks == []


def test_a_rank_that_answers_nothing_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="no rank answered 'q64'"):
        _collect(tmp_path, Asked(), ranks=Ranks(0, 2))
    with pytest.raises(ValueError, match="give a folder"):
        AnswerLog(ranks=Ranks(0, 2))


def test_answers_of_another_model_question_or_image_are_asked_again(tmp_path):
    _collect(tmp_path, Asked(), SAMPLES[:3], identity="a")
    image = tmp_path / "image.png"
    image.write_bytes(b"1")
    shown = [Sample(id="q0", prompt="What is 0?", answer="0", task="name", image=str(image))]
    for samples, identity, asked in (
        (SAMPLES[:3], "a", 0), (SAMPLES[:3], "b", 1), (SAMPLES[:2], "a", 1), (shown, "a", 1), (shown, "a", 0)
    ):  # fmt: skip
        ask = Asked()
        _collect(tmp_path, ask, samples, identity=identity)
        assert len(ask.blocks) == asked
    image.write_bytes(b"12")
    ask = Asked()
    _collect(tmp_path, ask, shown, identity="a")
    assert len(ask.blocks) == 1


def test_a_question_that_cannot_be_asked_is_listed_and_costs_no_other(tmp_path):
    def ask(samples):
        if any(s.id == "q7" for s in samples):
            raise OSError("q7.png: not an image")
        return [s.answer for s in samples]

    for _ in range(2):  # and read from the file
        log, answers = _collect(tmp_path, ask)
        assert answers == [None if i == 7 else str(i) for i in range(len(SAMPLES))]
        assert log.failures == [
            {"task": "name", "condition": "wrong image", "id": "q7", "error": "OSError: q7.png: not an image"}
        ]
