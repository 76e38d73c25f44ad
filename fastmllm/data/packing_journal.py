"""Where packing stands, written down now and then, so that a resumed run need not pack from the start again."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from fastmllm.data.shard_index import Skipped

EVERY = 16  # micro-batches of a lane


@dataclass(frozen=True, kw_only=True, slots=True)
class Filled:
    """A micro-batch, and how its lane goes on behind it.

    Args:
        index: of the micro-batch.
        draws: its samples.
        skipped: what was left out while it was filled.
        pulled: how many draws the lane has looked at.
        waiting: those of them that have no place yet, oldest first.
    """

    index: int
    draws: tuple[int, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    pulled: int = 0
    waiting: tuple[int, ...] = ()


class Journal:
    """States of lanes, a line each, in `packing-<rank>.jsonl` of a folder; those of all ranks are read.

    It holds nothing that cannot be computed: what is missing, torn or of another order is passed over.

    Args:
        folder: of the run.
        rank: of the file that is written.
        lanes: their number.
        identity: of all that the order depends on.
    """

    def __init__(self, folder: Path, rank: int, lanes: int, identity: str) -> None:
        self.folder, self.rank, self.lanes, self.identity = folder, rank, lanes, identity
        self.path = folder / f"packing-{rank}.jsonl"
        self._known: dict[int, list[Filled]] | None = None
        self._broken = False

    def note(self, filled: Filled) -> None:
        """Write down where a lane stands, every `EVERY` of its micro-batches."""
        if self._broken or filled.index // self.lanes % EVERY:
            return
        line = {"of": self.identity, "index": filled.index, "pulled": filled.pulled, "waiting": filled.waiting}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            print(f"{self.path}: not written ({error.strerror}); resuming will take longer", file=sys.stderr)
            self._broken = True

    def before(self, lane: int, index: int) -> Filled | None:
        """Return the newest state of a lane before a micro-batch; None where there is none."""
        if self._known is None:
            self._known = self._read()
        known = [filled for filled in self._known.get(lane, ()) if filled.index < index]
        return max(known, key=lambda filled: filled.index, default=None)

    def _read(self) -> dict[int, list[Filled]]:
        known: dict[int, list[Filled]] = {}
        for path in sorted(self.folder.glob("packing-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    found = json.loads(line)
                    if found["of"] != self.identity:
                        continue
                    index, pulled, waiting = int(found["index"]), int(found["pulled"]), tuple(found["waiting"])
                    known.setdefault(index % self.lanes, []).append(Filled(index=index, pulled=pulled, waiting=waiting))
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a kill cut short
        return known
