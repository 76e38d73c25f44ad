from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
from tiny_shards import captions, png, talk, write_tar

from fastmllm.data import shards
from fastmllm.data.images import open_image
from fastmllm.data.sample import Conversation, Turn
from fastmllm.data.shards import ShardSource, SourceConfig, expand


def source(path: Path | str, cache: Path, **more: object) -> ShardSource:
    return ShardSource(SourceConfig(name="s", path=str(path), **more), cache=cache / "cache")


def everything(of: ShardSource) -> dict[str, Conversation]:
    found = [of.read(draw) for draw in range(of.num_samples)]
    assert all(isinstance(sample, Conversation) for sample in found)
    return {sample.id.rpartition("/")[2]: sample for sample in found}


def test_a_tar_of_every_kind(tmp_path: Path) -> None:
    text = talk("hello", "hi", "and now?", "bye")
    two = talk("which is red?", "the second", images=2)
    numbered = [(f"m.{i}.png", png(i)) for i in (10, 2)]
    members = [
        *[("c.jpg", png(form="JPEG")), ("c.txt", b" a red thing\n")],
        *[("dir/t.json", text), ("__key__.txt", b"meta"), (".hidden.txt", b"no")],
        *[*numbered, ("m.json", two), ("w.WEBP", png(form="WEBP")), ("w.json", {"caption": "wide"})],
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    samples = everything(source(shard, tmp_path, caption_prompt="Say it."))
    assert set(samples) == {"c", "t", "m", "w"}
    assert samples["c"].turns == (Turn(prompt="<image>Say it.", answer="a red thing"),)
    assert samples["t"].id == "s/a.tar/dir/t"
    assert samples["t"].turns == (Turn(prompt="hello", answer="hi"), Turn(prompt="and now?", answer="bye"))
    assert samples["t"].images == ()
    assert samples["m"].turns[0].prompt == "<image>\n<image>\nwhich is red?"
    assert [open_image(name).getpixel((0, 0)) for name in samples["m"].images] == [(2, 7, 9), (10, 7, 9)]
    assert open_image(samples["w"].images[0]).size == (4, 4)


@pytest.mark.parametrize("kind", ["jsonl", "json", "folder"])
def test_the_same_samples_from_json_and_folders(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (root / "1.png").write_bytes(png(1))
    (root / "2.png").write_bytes(png(2, (6, 3)))
    records = [
        talk("schön, was?", "rot", images=1) | {"image": "1.png"},
        talk("beide?", "ja", "sicher?", "ja", images=2) | {"image": ["1.png", "2.png"]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]},
    ]
    records[2]["messages"].append({"role": "assistant", "content": "ho"})
    if kind == "jsonl":
        path = tmp_path / "a.jsonl"
        path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    elif kind == "json":
        path = tmp_path / "a.json"
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        path = root
        for i, record in enumerate(records):
            (root / f"r{i}.json").write_text(json.dumps(record), encoding="utf-8")
        (root / "1.txt").write_text("one")
    made = source(path, tmp_path, root=str(root))
    samples = {sample.turns[0].prompt: sample for sample in everything(made).values()}
    assert samples["<image>\nschön, was?"].images == (str(root / "1.png"),)
    assert samples["<image>\n<image>\nbeide?"].images == (str(root / "1.png"), str(root / "2.png"))
    assert len(samples["<image>\n<image>\nbeide?"].turns) == 2
    assert (samples["hi"].system, samples["hi"].images) == ("Be brief.", ())
    draw = next(d for d in range(made.num_samples) if made.read(d) == samples["<image>\n<image>\nbeide?"])
    assert made.image_sizes(draw) == ((4, 4), (6, 3))
    if kind == "folder":
        assert samples["<image>Describe the image."].turns[0].answer == "one"
        assert Counter(s.reason for s in made.skipped()) == {"no text": 1}  # 2.png alone says nothing


def test_an_epoch_has_every_sample_once_and_workers_hold_few_indexes(tmp_path: Path) -> None:
    made = source(captions(tmp_path, shards=9, each=5), tmp_path, block_shards=2)
    epochs = [[made.read(e * 45 + d).turns[0].answer for d in range(45)] for e in range(3)]
    wanted = {f"s{s}-{i}" for s in range(9) for i in range(5)}
    assert all(len(epoch) == 45 and set(epoch) == wanted for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    copy = pickle.loads(pickle.dumps(made))
    assert copy._open == {}
    assert [copy.read(d).turns[0].answer for d in range(45, 90)] == epochs[1]
    assert len(made._open) <= 4
    assert made.where(3)[1] == made.read(3).id.rpartition("/")[2]


def test_a_forked_process_opens_its_own_indexes(tmp_path: Path, monkeypatch) -> None:
    made = source(captions(tmp_path, shards=1, each=3), tmp_path)
    first, sample = made._open[0], made.read(0)
    monkeypatch.setattr(shards.os, "getpid", lambda: -1)
    assert made.read(0) == sample
    assert made._open[0] is not first


def test_patterns(tmp_path: Path) -> None:
    captions(tmp_path, shards=12, each=1)
    names = [f"shard-{i:03}.tar" for i in range(12)]
    assert [p.name for p in expand(str(tmp_path / "shard-{000..011}.tar"))] == names
    assert [p.name for p in expand(str(tmp_path / "shard-{008..011}.tar"))] == names[8:]
    assert [p.name for p in expand(str(tmp_path / "*.tar"))] == names
    with pytest.raises(ValueError, match=r"shard-012\.tar: no such shard"):
        expand(str(tmp_path / "shard-{000..012}.tar"))
    with pytest.raises(ValueError, match="counts nothing"):
        expand(str(tmp_path / "shard-{3..1}.tar"))


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weight must be above 0"):
        SourceConfig(name="a", path="b", weight=0.0)
    with pytest.raises(ValueError, match="needs a name and a path"):
        SourceConfig(name="", path="b")
    with pytest.raises(ValueError, match="block_shards must be at least 1"):
        SourceConfig(name="a", path="b", block_shards=0)
    with pytest.raises(ValueError, match="no <image>"):
        SourceConfig(name="a", path="b", caption_prompt="<image>?")
    (tmp_path / "a.jsonl").write_text('{"image": "gone.png"}\n{"caption": "x", "image": "gone.png"}')
    with pytest.raises(ValueError, match=r"no usable sample in 1 shards .* the first: 0: no text"):
        source(tmp_path / "a.jsonl", tmp_path)
    for name, message in (("a.tar.gz", "a compressed tar has no random access"), ("a.bin", "neither .tar, .jsonl")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=message):
            source(tmp_path / name, tmp_path)
