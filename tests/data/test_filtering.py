"""A filter over shards with every kind of bad input: kept, dropped with reasons, written anew, nothing lost."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_shards import scene, write_tar

from fastmllm.data.filtering import measure as measuring
from fastmllm.data.filtering.decide import BELOW, decide
from fastmllm.data.filtering.measure import Measured, Measures, measure
from fastmllm.data.filtering.rules import FilterConfig
from fastmllm.data.shards import ShardSource, SourceConfig


def source(path: Path | str, cache: Path, **more: object) -> ShardSource:
    return ShardSource(SourceConfig(name="s", path=str(path), **more), cache=cache / "cache")


def run(path: Path | str, tmp: Path, measures: Measures | None = None, **config: object):
    made = source(path, tmp)
    out = decide(measure(made, tmp / "measured", measures), FilterConfig(**config), tmp / "out")
    return made, out


def listed(tmp: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (tmp / "out" / name).read_text().splitlines()]


def keys(tmp: Path, name: str = "kept.jsonl") -> list[str]:
    return [row["key"] for row in listed(tmp, name)]


def bad_shard(path: Path) -> Path:
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, format="PNG")
    broken = scene(7)[:90]
    return write_tar(
        path,
        [
            *[("good.png", scene(1)), ("good.txt", b"a red barn by the lake")],
            *[("twin.jpg", b"not an image"), ("twin.txt", b"words")],
            *[("cut.png", broken), ("cut.txt", b"words")],
            *[("bomb.png", bomb.getvalue()), ("bomb.txt", b"words")],
            *[("../up.png", scene(2)), ("../up.txt", b"climbs out")],
            *[("/abs.png", scene(3)), ("/abs.txt", b"absolute")],
            *[("json.json", b"{not json"), ("json.png", scene(4))],
            ("reads.json", {"image": "../../etc/passwd.png", "caption": "another's file"}),
            *[("good.png", scene(5)), ("good.txt", b"the same key again")],
            *[("last.png", scene(6)), ("last.txt", b"a blue boat on the sea")],
        ],
    )


def test_bad_input_is_counted_listed_and_left_out(tmp_path: Path) -> None:
    shard = bad_shard(tmp_path / "a.tar")
    _, out = run(shard, tmp_path)
    assert keys(tmp_path) == ["good", "last"]
    reasons = {row["key"]: row["reason"] for row in listed(tmp_path, "dropped.jsonl")}
    assert reasons == {
        "twin": "undecodable image",
        "cut": "undecodable image",
        "bomb": "decompression bomb",
        "../up": "unsafe path",
        "/abs": "unsafe path",
        "json": "wrong JSON",
        "reads": "unsafe path",
        "good": "duplicate id",
    }
    assert out.seen == out.kept + sum(out.dropped.values()) == 12  # two members of each unsafe sample
    assert out.dropped["unsafe path"] == 5
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["dropped"] == dict(out.dropped)
    assert {e.detail for e in out.examples["decompression bomb"]} == {"9000 x 9000 pixels, more than 67108864"}


def test_a_line_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmllm.data.shard_scan.MAX_TEXT", 200)
    good = json.dumps({"text": "a short one"})
    path = tmp_path / "a.jsonl"
    half = '{"text": "\\ud83d alone"}'  # half a surrogate pair
    path.write_text(f'{good}\n{{"text": "{"x" * 700}"}}\n[1]\n\n{good[:-6]}b"}}\n{half}', encoding="utf-8")
    run(path, tmp_path)
    assert keys(tmp_path) == ["0", "4"]
    assert {row["key"]: row["reason"] for row in listed(tmp_path, "dropped.jsonl")} == {
        "1": "text too large",
        "2": "wrong JSON",
        "5": "wrong JSON",
    }


def rows(*records: tuple[tuple[int, int], str]) -> list[tuple[str, bytes]]:
    members = []
    for i, (size, text) in enumerate(records):
        members += [(f"{i}.png", scene(i, size)), (f"{i}.txt", text.encode())]
    return members


def test_every_threshold_and_its_reason(tmp_path: Path) -> None:
    small, wide, fine = (20, 40), (100, 30), (40, 40)
    shard = write_tar(
        tmp_path / "a.tar",
        rows(
            *[(fine, "a dog that sleeps on the mat"), (small, "a dog"), (wide, "a dog that runs on the beach")],
            *[(fine, "dog"), (fine, "一只狗在海滩上跑"), (fine, "ein Hund und eine Katze auf dem Sofa")],
            *[(fine, "one two three four five six seven eight nine ten"), (fine, "一只狗坐着 and one more")],
        ),
    )
    limits = {"min_side": 30, "max_aspect": 3.0, "min_words": 3, "max_words": 9, "min_chars": 6}
    _, out = run(shard, tmp_path, languages=("en", "zh"), **limits)
    assert keys(tmp_path) == ["0", "4", "7"]
    assert out.dropped == {
        "image too small": 1, "aspect ratio": 1, "text too short": 1, "language": 1, "text too long": 1
    }  # fmt: skip
    assert out.failing["text too short"] == 2  # also the small image's
    _, loose = run(shard, tmp_path, max_pixels=1600)
    assert loose.dropped == {"image too large": 1}


def test_measurements_are_made_once_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "CHUNK", 4)
    shard = write_tar(tmp_path / "a.tar", rows(*[((40, 40), f"picture number {i}") for i in range(10)]))
    made, seen = source(shard, tmp_path), []

    def scorer(images, texts):
        seen.extend(texts)
        return [0.1 * len(text) for text in texts]

    measures = Measures(scorer=scorer, name="length", batch_size=3)
    stopped = measure(made, tmp_path / "m", measures)
    first = [next(stopped) for _ in range(5)]
    stopped.close()
    assert len(seen) == 8  # two files of four
    whole = list(measure(made, tmp_path / "m", measures))
    assert len(seen) == 10
    assert whole[:5] == first
    assert list(measure(made, tmp_path / "m", measures)) == whole
    assert len(seen) == 10
    assert whole[3].score == pytest.approx(1.6)
    again = Measures(scorer=scorer, name="length 2")
    list(measure(made, tmp_path / "m", again))
    assert len(seen) == 20


def numbered(scores: list[float | None]) -> list[Measured]:
    return [
        Measured(shard="s", key=str(i), answer=f"text {i}", sizes=((9, 9),) if s is not None else (), score=s)
        for i, s in enumerate(scores)
    ]


def test_the_top_fraction_is_exact_and_ties_go_to_the_first(tmp_path: Path) -> None:
    samples = numbered([0.1, 0.5, 0.3, None, 0.5, 0.5, 0.2])
    out = decide(samples, FilterConfig(top_fraction=0.34), tmp_path / "out")  # 2 of 6
    assert keys(tmp_path) == ["1", "3", "4"]  # text alone is not ranked
    assert (out.cut, out.dropped[BELOW], out.scores["count"]) == (0.5, 4, 6)
    out = decide(samples, FilterConfig(min_score=0.3), tmp_path / "out")
    assert keys(tmp_path) == ["1", "2", "3", "4", "5"]
    assert out.dropped == {"image-text score": 2}
    equal = numbered([0.5] * 200)
    decide(equal, FilterConfig(top_fraction=0.5), tmp_path / "out")
    assert keys(tmp_path) == [str(i) for i in range(100)]
    unscored = [Measured(shard="s", key="0", answer="x", sizes=((9, 9),))]
    with pytest.raises(ValueError, match="measure with a scorer"):
        decide(unscored, FilterConfig(min_score=0.3), tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


def test_duplicates_by_pixels_looks_and_words(tmp_path: Path) -> None:
    text = "a small dog runs along the sandy beach near the water in the evening"
    members = [
        *[("0.png", scene(0)), ("0.txt", text.encode())],
        *[("1.bmp", scene(0, form="BMP")), ("1.txt", text.upper().encode())],  # other bytes, same pixels
        *[("2.jpg", scene(0, (50, 50), "JPEG", 60)), ("2.txt", (text + " sun").encode())],  # scaled and compressed
        *[("3.png", scene(3)), ("3.txt", text.encode())],  # another picture
        *[("4.png", scene(0)), ("4.txt", b"where is the cat?")],  # another text
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    found = {}
    kinds = ("sample", "image", "text")
    for exact, near in [*(((kind,), ()) for kind in kinds), *(((), (kind,)) for kind in kinds)]:
        run(shard, tmp_path, exact=exact, near=near)
        found[exact, near] = keys(tmp_path)
    assert found == {
        (("sample",), ()): ["0", "2", "3", "4"],
        (("image",), ()): ["0", "2", "3"],
        (("text",), ()): ["0", "2", "4"],
        ((), ("sample",)): ["0", "3", "4"],
        ((), ("image",)): ["0", "3"],
        ((), ("text",)): ["0", "4"],
    }
    detail = [row["detail"] for row in listed(tmp_path, "dropped.jsonl")]
    assert set(detail) == {f"of {shard}: 0"}


@pytest.mark.parametrize(
    "config", [{"top_fraction": 0.0}, {"near_text": 0.3}, {"near_bits": 20}, {"min_words": 5, "max_words": 3}]
)
def test_thresholds_out_of_range_are_refused(config: dict) -> None:
    with pytest.raises(ValueError, match="filter:"):
        FilterConfig(**config)
