from __future__ import annotations

import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from tiny_shards import captions, png, talk, write_tar

from fastmllm.data import shard_index
from fastmllm.data.byte_range import ByteRange
from fastmllm.data.conversation import RecordError
from fastmllm.data.shard_index import open_index
from fastmllm.data.shard_reader import ShardReader
from fastmllm.data.shard_scan import scan


def index_of(shard: Path, **more: object) -> shard_index.ShardIndex:
    reader = ShardReader(root=shard.parent, source="s", **more)
    return open_index(shard, reader, shard.parent / "cache")


def reasons(shard: Path) -> list[tuple[str, str]]:
    return [(s.key, s.reason) for s in index_of(shard).skipped(str(shard))]


def keys(shard: Path) -> list[str]:
    index = index_of(shard)
    return [index[i].key for i in range(index.num_samples)]


def test_offsets_are_tarfiles(tmp_path: Path) -> None:
    captions(tmp_path, shards=1, each=3, size=(7, 5))
    shard = tmp_path / "shard-000.tar"
    index = index_of(shard)
    with tarfile.open(shard) as tar:
        wanted = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    found = {}
    for i in range(3):
        assert index[i].sizes == ((7, 5),)
        for part in index[i].parts:
            found[f"{index[i].key}.{part.field}"] = ByteRange(str(shard), part.offset, part.size).read()
    assert found == wanted
    with pytest.raises(IndexError, match="sample 3 of 3"):
        index[3]


def test_an_index_is_made_once_and_again_when_the_shard_changes(tmp_path: Path, monkeypatch) -> None:
    captions(tmp_path, shards=1, each=3)
    shard, built, build = tmp_path / "shard-000.tar", [], shard_index._build
    monkeypatch.setattr(shard_index, "_build", lambda *given: (built.append(1), build(*given)))
    first = index_of(shard)
    assert (index_of(shard).num_samples, len(built)) == (3, 1)
    stat = shard.stat()
    captions(tmp_path, shards=1, each=2)
    assert (index_of(shard).num_samples, len(built)) == (2, 2)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert (index_of(shard).num_samples, len(built)) == (2, 3)
    file = next((tmp_path / "cache" / "shards").iterdir())
    file.write_bytes(file.read_bytes()[:700])  # damaged
    assert (index_of(shard).num_samples, len(built)) == (2, 4)
    assert first[2].key == "002"  # an index in use lives on
    assert [p.name for p in (tmp_path / "cache" / "shards").iterdir()] == [file.name]  # and nothing half-written


def test_an_index_is_streamed(tmp_path: Path) -> None:
    """A list of 4,000 records is indexed, and read, in far less memory than it takes."""
    lines = [talk("hello " * 200, f"answer {i}") for i in range(4000)]
    for name, text in (("a.jsonl", "\n".join(map(json.dumps, lines))), ("a.json", json.dumps(lines))):
        (tmp_path / name).write_text(text)
        tracemalloc.start()
        index = index_of(tmp_path / name)
        assert index.num_samples == 4000
        reader = ShardReader(root=tmp_path, source="s")
        assert reader.read(tmp_path / name, index[2345]).turns[0].answer == "answer 2345"
        assert tracemalloc.get_traced_memory()[1] < len(text) / 3  # buffers of 256 KB and what is decoded of it
        tracemalloc.stop()


def test_a_tar_of_many_members_is_streamed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"x") for i in range(3000)])
    tracemalloc.start()
    assert sum(1 for _ in scan(shard)) == 3000
    assert tracemalloc.get_traced_memory()[1] < 10**6  # tarfile alone keeps all headers
    tracemalloc.stop()


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch) -> None:
    captions(tmp_path, shards=1, each=200)
    monkeypatch.setattr(shard_index, "_TABLES", shard_index._TABLES + "PRAGMA max_page_count = 6;")  # SQLITE_FULL
    with pytest.raises(OSError, match="free some space or set FASTMLLM_CACHE"):
        index_of(tmp_path / "shard-000.tar")
    assert not list((tmp_path / "cache" / "shards").iterdir())


def test_bad_members_are_listed_and_the_others_stay(tmp_path: Path) -> None:
    doubled = [("d.txt", b"a"), ("d.TXT", b"b")]
    members = [
        ("a.png", png()), ("a.txt", b"fine"), ("b.json", b"{"), ("c.png", b"no image"), ("c.txt", b"x"), *doubled,
        ("e.json", talk("how many?", "two", images=2)), ("e.png", png()), ("f.png", png()), ("g.txt", b"\xff"),
        ("h.json", b"[1]"), ("i.json", {"conversations": [{"from": "bot", "value": "x"}]}), ("j.mp3", b"la"),
        ("k.json", talk("a", "b <image>")), ("l.json", talk("a", "b", "c")), ("m.json", talk(" ", "b")),
        ("z.txt", b"fine"),
    ]  # fmt: skip
    shard = write_tar(tmp_path / "a.tar", members)
    assert keys(shard) == ["a", "z"]
    assert reasons(shard) == [
        ("b", "wrong JSON"), ("c", "undecodable image"), ("d", "duplicate member"), ("e", "image count"),
        ("f", "no text"), ("g", "text is not UTF-8"), ("h", "wrong JSON"), ("i", "wrong turns"), ("j", "no text"),
        ("k", "misplaced image"), ("l", "wrong turns"), ("m", "empty turn"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "cut", ["in a header", "in an image", "in a text", "at a boundary", "header damaged", "no tar"]
)
def test_a_truncated_tar_keeps_what_came_before(tmp_path: Path, cut: str) -> None:
    members = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", png(i, (90, 90))), ("txt", b"x"))]
    shard = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(shard) as tar:
        last, text = tar.getmembers()[4:]  # 2.png, 2.txt
    data = shard.read_bytes()
    end = {"in a header": last.offset + 100, "in an image": last.offset_data + 9, "at a boundary": last.offset}
    end["in a text"] = text.offset_data
    if cut == "no tar":
        data = b"\0\1" * 700
    elif cut == "header damaged":
        data = data[: last.offset] + b"?" * 512 + data[last.offset_data :]
    else:
        data = data[: end[cut]]
    shard.write_bytes(data)
    assert keys(shard) == ([] if cut == "no tar" else ["0", "1"])
    assert reasons(shard) == [("2" if cut in ("in an image", "in a text") else "", "truncated shard")]


def test_wrong_json_files(tmp_path: Path) -> None:
    good = json.dumps(talk("a", "b"))
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(f"{good}\n{{nope\n\n".encode() + b'{"caption": "\xff"}\n' + good.encode()[:-4])
    assert keys(lines) == ["0"]
    assert reasons(lines) == [("1", "wrong JSON"), ("3", "wrong JSON"), ("4", "wrong JSON")]
    listed = tmp_path / "a.json"
    listed.write_bytes(f" [{good} , {good}, 3, ".encode() + b'{"caption": "\xff"},' + f"{good}, {good[:-3]}".encode())
    assert keys(listed) == ["0", "1", "4"]
    assert reasons(listed) == [("2", "wrong JSON"), ("3", "wrong JSON"), ("5", "wrong JSON")]
    listed.write_text('{"a": [1]}')
    assert reasons(listed) == [("", "wrong JSON")]


def test_a_missing_image_that_comes_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"caption": "x", "image": f"{i}.png"}) for i in range(3)))
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "1.png").write_bytes(b"damaged")
    assert reasons(path) == [("1", "undecodable image"), ("2", "missing file")]
    (tmp_path / "1.png").write_bytes(png())
    assert reasons(path) == [("2", "missing file")]
    (tmp_path / "2.png").write_bytes(png())
    assert (reasons(path), keys(path)) == ([], ["0", "1", "2"])


def test_a_shard_that_changed_under_its_index(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(talk("a", "b")))
    index, reader = index_of(path), ShardReader(root=tmp_path, source="s")
    located = index[0]
    path.write_text("{")
    with pytest.raises(RecordError, match=r"missing file: .* bytes too early"):
        reader.read(path, located)
