"""Frames of animations, of lists of images and of films: which are shown, and that each is the one that it is named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_shards import png, talk, write_tar

from fastmllm.data.byte_range import ByteRange
from fastmllm.data.images import ImageError, open_image
from fastmllm.data.shard_index import Skipped
from fastmllm.data.shards import ShardSource, SourceConfig
from fastmllm.data.video import Frame, chosen, measure

CLIP = {"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "it turns red"}


def gif(frames: int, size: tuple[int, int] = (8, 6)) -> bytes:
    """Draw frames whose red grows by 20."""
    out = io.BytesIO()
    drawn = [Image.new("RGB", size, (20 * number, 0, 90)) for number in range(frames)]
    drawn[0].save(out, format="GIF", save_all=True, append_images=drawn[1:], duration=40)
    return out.getvalue()


def red(name: str) -> int:
    return int(open_image(name).getpixel((3, 3))[0])


def source(path: Path, **more: Any) -> ShardSource:
    return ShardSource(SourceConfig(name="s", path=str(path), **more), cache=path.parent / "cache")


def test_frames_of_an_animation(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(gif(5))
    name = str(tmp_path / "a.gif")
    assert measure(name) == (5, (8, 6))
    assert [red(str(Frame(name, number))) for number in (3, 0, 4)] == pytest.approx([60, 0, 80], abs=4)
    assert Frame.parse(str(Frame(name, 3))) == Frame(name, 3)
    assert Frame.parse(name) is None
    with pytest.raises(ImageError, match="no frame 5"):
        open_image(str(Frame(name, 5)))
    with pytest.raises(ImageError, match="no such image"):
        open_image(str(Frame("gone.gif", 0)))


@pytest.mark.parametrize("frames, most, expected", [(3, 8, [0, 1, 2]), (10, 2, [2, 7]), (9, 3, [1, 4, 7]), (7, 1, [3])])
def test_frames_are_thinned_out_evenly(frames: int, most: int, expected: list[int]) -> None:
    assert chosen(frames, most) == expected


def test_videos_stand_beside_images_and_text_in_a_tar(tmp_path: Path) -> None:
    mixed = talk("<image>First, then <video>?", "yes", "And now?", "no")
    members: list[tuple[str, Any]] = [
        ("0.json", {"conversations": list(CLIP)}), ("0.video.gif", gif(10)),
        ("1.json", mixed), ("1.png", png(200)), *((f"1.video.{n}.png", png(10 * n, (5, 4))) for n in range(12)),
        ("2.json", talk("Say yes", "yes")),
        ("3.gif", gif(3)), ("3.txt", b"a drawing"),  # an image: nothing says that it is a video
        ("4.video.gif", gif(2)), ("4.txt", b"a clip"),
        ("5.json", {"conversations": list(CLIP)}), ("5.video.gif", gif(4)[:5]),
        ("6.json", {"conversations": list(CLIP)}), ("6.png", png()),
    ]  # fmt: skip
    made = source(write_tar(tmp_path / "s.tar", members), max_frames=4)
    samples = {}
    for draw in range(made.num_samples):
        sample = made.read(draw)
        assert not isinstance(sample, Skipped)
        samples[sample.id[-1]] = (sample, made.image_sizes(draw))
    assert sorted(samples) == ["0", "1", "2", "3", "4"]
    clip, sizes = samples["0"]
    assert clip.turns[0].prompt == "<image>" * 4 + "\nWhat happens?"
    assert [red(name) for name in clip.images] == pytest.approx([20, 60, 120, 160], abs=4)
    assert sizes == ((8, 6),) * 4
    both, sizes = samples["1"]
    assert both.turns[0].prompt == "<image>First, then " + "<image>" * 4 + "?"
    assert [red(name) for name in both.images] == [200, 10, 40, 70, 100]
    assert all(ByteRange.parse(name) for name in both.images)
    assert sizes == ((4, 4), *((5, 4),) * 4)
    assert [len(samples[key][0].images) for key in "234"] == [0, 1, 2]
    assert samples["4"][0].turns[0].prompt.startswith("<image><image>D")
    assert {(item.key, item.reason) for item in made.skipped()} == {("5", "undecodable video"), ("6", "image count")}


def test_json_names_videos(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"f{number}.png").write_bytes(png(50 * number))
    (tmp_path / "a.gif").write_bytes(gif(2))
    two = {"conversations": [{"from": "human", "value": "<video> or <video>?"}, {"from": "gpt", "value": "both"}]}
    clip = {"conversations": list(CLIP)}
    records = [
        clip | {"video": "a.gif"},
        clip | {"video": ["f0.png", "f1.png", "f2.png"]},
        two | {"videos": ["a.gif", ["f2.png"]]},
        clip | {"video": 3},
        clip | {"video": ["f0.png", ""]},
        clip | {"video": "gone.gif"},
        clip,
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, records)))
    made = source(tmp_path / "s.jsonl")
    shown = {}
    for draw in range(3):
        sample = made.read(draw)
        assert not isinstance(sample, Skipped)
        shown[sample.id[-1]] = [red(name) for name in sample.images]
    assert shown["0"] == pytest.approx([0, 20], abs=4)
    assert shown["1"] == [0, 50, 100]
    assert shown["2"] == pytest.approx([0, 20, 100], abs=4)
    reasons = {item.key: item.reason for item in made.skipped()}
    assert reasons == {"3": "wrong videos", "4": "wrong videos", "5": "missing file", "6": "video count"}
    with pytest.raises(ValueError, match="max_frames must be at least 1"):
        source(tmp_path / "s.jsonl", max_frames=0)


def test_films_need_a_decoder_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    write_tar(tmp_path / "s.tar", [("0.json", {"conversations": list(CLIP)}), ("0.mp4", b"\0" * 64)])
    with pytest.raises(ImportError, match="pip install av"):
        source(tmp_path / "s.tar")


def test_films_are_read_frame_by_frame(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 16), (20 * number, 20 * number, 20 * number)))
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))
    data = path.read_bytes()
    members: list[tuple[str, Any]] = [
        ("0.json", {"conversations": list(CLIP)}), ("0.mp4", data),
        ("1.json", {"conversations": list(CLIP)}), ("1.mp4", b"no film at all, but some bytes"),
    ]  # fmt: skip
    made = source(write_tar(tmp_path / "s.tar", members), max_frames=3)
    sample = made.read(0)
    assert not isinstance(sample, Skipped)
    expected = [20 * number for number in chosen(12, 3)]
    for _ in range(2):  # the second time from the start again
        assert [red(name) for name in sample.images] == pytest.approx(expected, abs=8)
    assert made.image_sizes(0) == ((32, 16),) * 3
    assert [item.reason for item in made.skipped()] == ["undecodable video"]
    with pytest.raises(ImageError, match="ends before frame 12"):
        open_image(str(Frame(str(path), 12)))
