"""New captions with their origin, made once, written into new shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_shards import scene, talk, write_tar

from fastmllm.data.filtering.reshard import reshard
from fastmllm.data.instruct.recaption import in_circles, recaption
from fastmllm.data.instruct.replies import Replies
from fastmllm.data.records import write_records
from fastmllm.data.shards import ShardSource, SourceConfig


def test_captions_are_made_once_and_reach_new_shards(tmp_path: Path) -> None:
    members = [[(f"{i}.png", scene(i)), (f"{i}.txt", f"old {i}".encode())] for i in range(5)]
    bad = [("bad.png", scene(9)[:200]), ("bad.txt", b"cut"), ("words.json", talk("hi", "ho"))]
    shard = write_tar(tmp_path / "a.tar", [member for sample in members for member in sample] + bad)
    source = ShardSource(SourceConfig(name="s", path=str(shard)), cache=tmp_path / "cache")
    seen: list[str] = []

    def captioner(images):
        seen.extend(images)
        return ["" if name.startswith(seen[1]) else f"new {seen.index(name)}" for name in images]

    def run():
        replies = Replies(tmp_path / "r.sqlite", "toy-1")
        return write_records(
            tmp_path / "new.jsonl", recaption(source, captioner, replies, prompt="Say it.", batch_size=2)
        )

    assert (run().records, len(seen)) == (4, 5)
    written = run()
    assert len(seen) == 5  # remembered
    assert written.skipped == {"nothing to caption": 2, "unusable caption": 1}
    lines = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    made = {"by": "recaption", "model": "toy-1", "prompt": "Say it.", "before": "old 0"}
    assert lines[0] == {"shard": str(shard), "key": "0", "record": {"caption": "new 0", "made": made}}
    done = reshard(source, tmp_path / "new.jsonl", tmp_path / "out")
    again = ShardSource(SourceConfig(name="n", path=str(done.shards[0])), cache=tmp_path / "cache")
    assert [again.sample(0, i).turns[0].answer for i in range(4)] == ["new 0", "new 2", "new 3", "new 4"]
    with pytest.raises(ValueError, match="0 captions for 2 images"):
        list(recaption(source, lambda images: [], Replies(tmp_path / "q.sqlite", "toy-2"), prompt="x", batch_size=2))


def test_captions_that_go_round_in_circles() -> None:
    assert in_circles("a dog on a mat on a mat on a mat on a mat") == "on a mat"
    assert in_circles("red red red red") == "red"
    assert in_circles("a very very nice dog on a mat") == ""
