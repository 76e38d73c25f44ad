"""Corrupt, contradictory and outlying pairs are found and listed, the others kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fastmllm.data.clean import clean
from fastmllm.data.filtering.image_print import ImagePrint
from fastmllm.data.filtering.measure import Measured
from fastmllm.data.loss_outliers import CleanConfig, read_losses


def sample(key: int | str, question: str, answer: str, pixels: str = "x", **more: object) -> Measured:
    colours = tuple(3 * hashlib.md5(pixels.encode()).digest())  # of another picture all are others
    prints = (ImagePrint(pixels, 0, colours),) if pixels else ()
    return Measured(shard="s.tar", key=str(key), question=question, answer=answer, prints=prints, **more)


def found(tmp: Path, reason: str) -> dict[str, dict]:
    rows = [json.loads(line) for line in (tmp / "findings.jsonl").read_text().splitlines()]
    return {row["key"]: row for row in rows if row["reason"] == reason}


def kept(tmp: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (tmp / "kept.jsonl").read_text().splitlines()]


def test_different_answers_to_one_question_about_equal_pixels(tmp_path: Path) -> None:
    long = "a very long caption of this image that goes on"
    samples = [
        sample(0, "What is this?", "a dog"), sample(1, "what is this", "Cat."), sample(2, "What is this?", "The dog!"),
        sample(3, "What is this?", "bird", "y"), sample(4, "What colour?", "red"), sample(10, "What colour?", "Red."),
        sample(5, "Describe it.", long), sample(6, "Describe it.", long + " and on"),
        sample(7, "Capital?", "Paris", ""), sample(8, "Capital?", "Rome", ""),
        sample(9, "", "", "", problem=("undecodable image", "cut")),
    ]  # fmt: skip
    done = clean(samples, tmp_path)
    rows = found(tmp_path, "contradictory answers")
    assert set(rows) == {"0", "1", "2", "7", "8"}
    assert rows["0"]["others"] == ["1"]
    assert rows["1"]["others"] == ["0", "2"]
    assert "'dog' x 2, 'cat' x 1" in rows["1"]["detail"]
    assert kept(tmp_path) == ["3", "4", "10", "5", "6"]
    assert (done.seen, done.kept, done.found) == (11, 5, {"undecodable image": 1, "contradictory answers": 5})


def test_one_picture_twice_with_two_labels(tmp_path: Path) -> None:
    looks = [ImagePrint("x", 0b1111 << 20, (90,) * 48), ImagePrint("y", 0b1101 << 20, (93,) * 48)]
    looks.append(ImagePrint("z", 0b1111 << 20, (190,) * 48))  # another colour
    samples = [
        Measured(shard="s", key=str(i), question="What is this?", answer=answer, prints=(look,))
        for i, (look, answer) in enumerate(zip(looks, ("shorts", "skirt", "hat"), strict=True))
    ]
    clean(samples, tmp_path)
    assert set(found(tmp_path, "contradictory answers")) == {"0", "1"}
    assert not clean(samples, tmp_path, config=CleanConfig(near_bits=0)).found


def test_losses_far_from_those_of_their_question(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    samples, losses = [], {}
    for i in range(200):
        easy = i < 150
        samples.append(sample(i, "Is it red?" if easy else "Describe it.", f"answer {i}", f"p{i}"))
        losses["s.tar", str(i)] = (float(generator.normal(0.3 if easy else 3.0, 0.05)), None)
    for key, loss in {"7": 1.0, "160": 1.0, "170": 4.0, "8": float("nan"), "9": float("-inf")}.items():
        losses["s.tar", key] = (loss, None)
    del losses["s.tar", "30"]  # without a loss it is not judged
    done = clean(samples, tmp_path, losses)
    rows = found(tmp_path, "loss outlier")
    assert set(rows) == {"7", "8", "9", "170"}  # 1.0 is low among descriptions
    assert "of 147" in rows["7"]["detail"]
    assert done.kept == 196
    done = clean(samples, tmp_path / "few", losses, CleanConfig(group=190))  # all together: descriptions stand out
    assert done.found["loss outlier"] == 50 + 3


def test_answers_that_their_image_makes_less_likely(tmp_path: Path) -> None:
    samples = [sample(i, f"q {i}", "a", f"p{i}") for i in range(4)]
    losses = {("s.tar", str(i)): pair for i, pair in enumerate([(1.0, 1.2), (1.9, 1.2), (1.6, 1.2), (1.0, None)])}
    clean(samples, tmp_path, losses)
    assert set(found(tmp_path, "image does not fit")) == {"1"}


def test_equal_losses_are_no_outliers(tmp_path: Path) -> None:
    samples = [sample(i, "q", f"a {i}", f"p{i}") for i in range(40)]
    assert not clean(samples, tmp_path, {("s.tar", str(i)): (0.0, None) for i in range(40)}).found
    lone = {("s.tar", str(i)): (0.0 if i else 5.0, None) for i in range(40)}  # median deviation 0
    assert clean(samples, tmp_path, lone).found == {"loss outlier": 1}


def test_ids_that_two_records_of_a_file_share(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}, {"id": 1, "text": "other"}, {"id": 2, "text": "two"}]
    path.write_text("\n".join(map(json.dumps, records)))
    samples = [Measured(shard=str(path), key=str(i), answer=f"a {i}", question=f"q {i}") for i in range(4)]
    clean(samples, tmp_path / "out")
    rows = found(tmp_path / "out", "duplicate id")
    assert {key: row["others"] for key, row in rows.items()} == {"2": ["0"]}
    assert kept(tmp_path / "out") == ["0", "1", "3"]


def test_files_of_losses(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"shard": "s", "key": "0", "loss": 1.5}\n{"shard": "s", "key": "1", "loss": 2, "blind": 3}\n')
    assert read_losses(path) == {("s", "0"): (1.5, None), ("s", "1"): (2.0, 3.0)}
    path.write_text('{"shard": "s", "loss": 1.5}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_losses(path)
    with pytest.raises(ValueError, match="clean:"):
        CleanConfig(group=1)
