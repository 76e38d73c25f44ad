from __future__ import annotations

import json
from pathlib import Path

from fastmllm.data.shard_index import Skipped
from fastmllm.data.skipped_log import SkippedLog


def item(key: str) -> Skipped:
    return Skipped(shard="s", key=key, reason="r", detail="d")


def test_what_was_left_out_before_is_listed_once_by_the_first_rank(tmp_path: Path) -> None:
    for rank in (0, 1):
        log = SkippedLog(tmp_path / "out", rank, before=lambda: [item("index")])
        assert rank or not (tmp_path / "out").exists()  # not before the first batch
        log.note(rank, [item("a")])
        log.note(rank + 2, [])
    SkippedLog(tmp_path / "out", 0, before=lambda: [item("index")]).note(4, [item("b")])
    first, second = (
        [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("skipped.jsonl", "skipped-1.jsonl")
    )
    assert [(line["key"], line.get("micro_batch")) for line in first] == [("index", None), ("a", 0), ("b", 4)]
    assert [(line["key"], line["micro_batch"]) for line in second] == [("a", 1)]
