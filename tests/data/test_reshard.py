"""A list of kept samples becomes new shards: exact, resumable, and what the source lost is listed."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from tiny_shards import scene, talk, write_tar

from fastmllm.data.filtering.reshard import reshard
from fastmllm.data.shards import ShardSource, SourceConfig


def source(path: Path | str, cache: Path) -> ShardSource:
    return ShardSource(SourceConfig(name="s", path=str(path)), cache=cache / "cache")


def kept_of(made: ShardSource, path: Path) -> Path:
    lines = [
        json.dumps({"shard": str(shard), "key": made.located(number, i).key}) + "\n"
        for number, shard in enumerate(made.shards)
        for i in range(made.sizes[number])
    ]
    path.write_text("".join(lines))
    return path


def read_all(pattern: str, tmp: Path) -> dict[str, tuple]:
    made = source(pattern, tmp)
    found = {}
    for shard in range(len(made.shards)):
        for number in range(made.sizes[shard]):
            sample = made.sample(shard, number)
            found[made.located(shard, number).key] = (sample.turns, made.located(shard, number).sizes)
    return found


def test_resharding_is_exact_resumable_and_loses_nothing(tmp_path: Path) -> None:
    root = tmp_path / "in"
    members = [[(f"{i}.png", scene(i)), (f"{i}.txt", f"picture {i}".encode())] for i in range(5)]
    write_tar(root / "a.tar", [member for sample in members for member in sample])
    (root / "x.PNG").write_bytes(scene(50))
    (root / "y.jpg").write_bytes(scene(51, form="JPEG"))
    records = [talk("both?", "yes", images=2) | {"image": ["x.PNG", "y.jpg"]}, {"text": "no image at all"}]
    (root / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    made = source(root / "[ab].*", tmp_path)
    kept = kept_of(made, tmp_path / "kept.jsonl")
    first = reshard(made, kept, tmp_path / "new", samples_per_shard=3)
    assert (len(first.shards), first.samples, first.missing) == (3, 7, 0)
    bytes_of = {path.name: path.read_bytes() for path in first.shards}
    copied = read_all(str(tmp_path / "new" / "*.tar"), tmp_path)
    before = [made.sample(s, n).turns for s in range(2) for n in range(made.sizes[s])]
    assert [turns for turns, _ in copied.values()] == before
    assert copied["000000005"][1] == ((48, 48), (48, 48))
    with tarfile.open(first.shards[1]) as tar:
        data = {m.name: tar.extractfile(m).read() for m in tar}
    assert data["000000005.0.png"] == scene(50)
    assert data["000000005.1.jpg"] == scene(51, form="JPEG")
    (tmp_path / "new" / "000001.origin.jsonl").unlink()  # killed between the two
    first.shards[2].unlink()
    again = reshard(made, kept, tmp_path / "new", samples_per_shard=3)
    assert {path.name: path.read_bytes() for path in again.shards} == bytes_of
    with pytest.raises(ValueError, match="another list"):
        reshard(made, kept, tmp_path / "new", samples_per_shard=4)


def test_of_two_samples_with_one_key_the_first_counts(tmp_path: Path) -> None:
    members = [("a.png", scene(0)), ("a.txt", b"first"), ("b.txt", b"x"), ("a.png", scene(1)), ("a.txt", b"second")]
    made = source(write_tar(tmp_path / "a.tar", members), tmp_path)
    (tmp_path / "kept.jsonl").write_text(json.dumps({"shard": str(tmp_path / "a.tar"), "key": "a"}) + "\n")
    reshard(made, tmp_path / "kept.jsonl", tmp_path / "new")
    assert [turns[0].answer for turns, _ in read_all(str(tmp_path / "new" / "*.tar"), tmp_path).values()] == ["first"]


def test_what_the_source_lost_is_listed(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(scene(0))
    lines = [json.dumps({"image": "x.png", "caption": "one"}), json.dumps({"text": "two"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    made = source(tmp_path / "a.jsonl", tmp_path)
    kept = kept_of(made, tmp_path / "kept.jsonl")
    kept.write_text(kept.read_text() + json.dumps({"shard": str(tmp_path / "a.jsonl"), "key": "9"}) + "\n")
    (tmp_path / "x.png").unlink()
    done = reshard(made, kept, tmp_path / "new")
    assert (done.samples, done.missing) == (1, 2)
    missing = [json.loads(line) for line in (tmp_path / "new" / "missing.jsonl").read_text().splitlines()]
    assert [row["from"] for row in missing] == ["0", "9"]
    kept.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1"):
        reshard(made, kept, tmp_path / "other")
