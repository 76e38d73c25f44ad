"""The list of samples that a stage left out: `skipped.jsonl` of its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from fastmllm.data.shard_index import Skipped


class SkippedLog:
    """Append what was left out, a line each; steps that are done again are listed again.

    Args:
        folder: of the stage; not touched before the first `note`, as a trainer may set it aside until then.
        rank: of this process; rank r > 0 writes `skipped-r.jsonl`.
        before: what was left out before the first batch; rank 0 lists it, once in a folder.
    """

    def __init__(self, folder: Path, rank: int, before: Callable[[], Iterable[Skipped]] = lambda: iter(())) -> None:
        self.path = folder / ("skipped.jsonl" if rank == 0 else f"skipped-{rank}.jsonl")
        self._before, self._begun, self._rank = before, False, rank

    def note(self, index: int, skipped: Iterable[Skipped]) -> None:
        """List what a micro-batch left out."""
        if not self._begun and self._rank == 0 and not self.path.exists():
            self._write(self._before())
        self._begun = True
        self._write(skipped, micro_batch=index)

    def _write(self, skipped: Iterable[Skipped], **more: int) -> None:
        lines = [json.dumps(asdict(item) | more) + "\n" for item in skipped]
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
