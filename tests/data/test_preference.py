from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmllm.data.packing import collate
from fastmllm.data.preference import Pair, collate_pairs, corrupted_image, pairs_of
from fastmllm.data.sample import Sample


def make(name: str, answer: str, image: Path | None = None, **options: object) -> Sample:
    path = None if image is None else str(image)
    return Sample(id=name, prompt="What is this?", answer=answer, task="name", image=path, **options)  # type: ignore[arg-type]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    ramp = np.arange(40 * 30, dtype=np.uint8).reshape(30, 40)
    path = tmp_path / "a.png"
    Image.fromarray(np.stack([ramp, ramp, ramp], -1)).save(path)
    return path


def test_the_wrong_answer_is_of_the_closed_set(tmp_path: Path) -> None:
    fruit, tool = {"group": "fruit"}, {"group": "tool"}
    tasks = {
        "name": [make("a", "apple", truth=fruit), make("b", "pear", truth=fruit), make("h", "hammer", truth=tool)],
        "yes_no": [make("y", "yes", choices=("yes", "no")), make("n", "no", choices=("yes", "no"))],
        "lone": [make("l", "sun", choices=("Sun", "the sun")), make("r", "x", references=("sun",))],
    }
    pairs, skipped = pairs_of(tasks, tmp_path)
    said = {pair.chosen.id: pair.rejected.answer for task in pairs.values() for pair in task}
    # confusable first, anything else where the group has one member; "the sun" is no other answer than "sun"
    assert {key: said[key] for key in "abyn"} == {"a": "pear", "b": "apple", "y": "no", "n": "yes"}
    assert said["h"] in ("apple", "pear")
    assert skipped == {"no wrong answer in a closed set": ["l", "r"]}
    assert all(pair.corrupted is None for task in pairs.values() for pair in task)
    assert pairs_of(tasks, tmp_path)[0] == pairs


def test_every_name_is_wrong_about_as_often_as_right(tmp_path: Path) -> None:
    names = [f"thing {i}" for i in range(6)]
    pairs, _ = pairs_of({"name": [make(f"{name}/{k}", name) for name in names for k in range(60)]}, tmp_path)
    wrong = Counter(pair.rejected.answer for pair in pairs["name"])
    assert set(wrong) == set(names)
    assert max(wrong.values()) < 1.6 * min(wrong.values())


def test_the_corrupted_image_is_a_small_crop_of_its_own(picture: Path, tmp_path: Path) -> None:
    pairs, skipped = pairs_of({"name": [make("a", "x", picture), make("b", "y", picture)]}, tmp_path / "c")
    assert not skipped
    first, second = (pair.corrupted for pair in pairs["name"])
    assert first is not None
    assert second is not None
    assert first.image == second.image != str(picture)
    assert (first.prompt, first.answer) == ("What is this?", "x")
    with Image.open(str(first.image)) as crop:
        assert crop.size == (40, 30)
        # a ramp of 40 values a row: a crop of at most sqrt(0.2) of the width spans at most 18 of them
        row = np.asarray(crop)[15, :, 0].astype(int)
    assert row.max() - row.min() <= 20
    before = corrupted_image(str(picture), tmp_path / "c")
    assert str(before) == first.image
    Image.new("RGB", (40, 30)).save(picture)
    assert corrupted_image(str(picture), tmp_path / "c") != before
    assert corrupted_image(str(picture), tmp_path / "c", seed=1).name.endswith("-s1.png")


def test_an_image_that_cannot_be_read_is_listed(picture: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(picture.read_bytes()[:60])
    tasks = {"name": [make("a", "x", damaged), make("b", "y", tmp_path / "none.png"), make("c", "z", picture)]}
    pairs, skipped = pairs_of(tasks, tmp_path / "c")
    assert [pair.chosen.id for pair in pairs["name"]] == ["c"]
    assert skipped == {"image that cannot be read": ["a", "b"]}


def test_a_batch_of_pairs_holds_each_image_once(tokenizer, picture: Path, tmp_path: Path) -> None:
    pairs, _ = pairs_of({"name": [make("a", "red", picture), make("t", "apple"), make("b", "What", picture)]}, tmp_path)

    def pack(samples: list[Sample]):
        return collate(samples, tokenizer, num_visual_tokens=2, image_size=8, image_token_id=299)

    batch = collate_pairs(pairs["name"], pack, lambda sample: float(len(sample.id)))
    assert batch.ids == ["a", "a/rejected", "a/corrupted", "t", "t/rejected", "b", "b/rejected", "b/corrupted"]
    assert batch.chosen.tolist() == [0, 3, 5]
    assert batch.rejected.tolist() == [1, 4, 6]
    assert batch.corrupted.tolist() == [2, 7]
    assert batch.corrupted_pair.tolist() == [0, 2]
    assert batch.reference.tolist() == [float(len(name)) for name in batch.ids]
    assert batch.num_targets == 3
    assert len(batch.batch.image_paths) == 2
    assert batch.batch.shown.tolist() == [0, 0, 1, 0, 0, 1]


def test_pairs_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="both answers are 'x'"):
        Pair(chosen=make("a", "x"), rejected=make("b", "x"))
    with pytest.raises(ValueError, match="one prompt about one image"):
        Pair(chosen=make("a", "x"), rejected=make("b", "y", Path("p.png")))
