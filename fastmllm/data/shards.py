"""A training source of any size: WebDataset tar shards, JSONL, JSON lists and folders, sample by sample at random.

The `webdataset` package is not needed: samples are found by an index and read where they lie, so that order and
resuming are exact, which a stream through pipes is not. `shard_scan` says which of its conventions are followed.
"""

from __future__ import annotations

import glob
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from fastmllm.data.cache import cache_dir
from fastmllm.data.conversation import CAPTION_PROMPT, RecordError
from fastmllm.data.order import BlockShuffle
from fastmllm.data.sample import Conversation
from fastmllm.data.shard_index import ShardIndex, Skipped, open_index, stamp_of
from fastmllm.data.shard_reader import Located, ShardReader

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """A source of training samples.

    Args:
        name: in logs, sample ids and orders.
        path: a .tar, .jsonl, .json (list) or folder; `*` and WebDataset's `{000..099}` name many.
        weight: share of the mixture; None = by number of samples, for all sources or for none.
        root: folder that image names in JSON are relative to; None = the JSON file's own, or the folder read.
        caption_prompt: asked before a caption (`.txt` beside an image), behind its images.
        block_shards: shards whose samples are mixed among each other; 1 reads shard by shard.
        max_frames: of a video, each an image to the model; more are thinned out evenly.
    """

    name: str
    path: str
    weight: float | None = None
    root: str | None = None
    caption_prompt: str = CAPTION_PROMPT
    block_shards: int = 8
    max_frames: int = 8

    def __post_init__(self) -> None:
        if not self.name or not self.path:
            raise ValueError(f"a source needs a name and a path, got name {self.name!r}, path {self.path!r}")
        if self.weight is not None and not 0.0 < self.weight < float("inf"):
            raise ValueError(f"source {self.name!r}: weight must be above 0, got {self.weight}; leave the source out")
        if self.block_shards < 1:
            raise ValueError(f"source {self.name!r}: block_shards must be at least 1, got {self.block_shards}")
        if self.max_frames < 1:
            raise ValueError(f"source {self.name!r}: max_frames must be at least 1, got {self.max_frames}")
        if not self.caption_prompt.strip() or "<image>" in self.caption_prompt:
            raise ValueError(f"source {self.name!r}: caption_prompt needs words and no <image>: the images go in front")


def expand(pattern: str) -> list[Path]:
    """List the shards that a pattern names, in order.

    Args:
        pattern: a path; `{000..099}` counts, `*`, `?` and `[...]` match files.

    Raises:
        ValueError: names nothing, or a counted shard is missing.
    """
    pieces = _BRACES.split(os.path.expanduser(pattern))  # text, first, last, text, first, last, ..., text
    ranges = [
        [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        for first, last in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    found: list[str] = []
    for numbers in product(*ranges):
        name = pieces[0] + "".join(n + text for n, text in zip(numbers, pieces[3::3], strict=True))
        if not (files := [name] if os.path.exists(name) else sorted(glob.glob(name))):
            raise ValueError(f"{name}: no such shard; check the path of the source")
        found += files
    if not found:
        raise ValueError(f"{pattern}: counts nothing; the first number must not be above the last")
    return [Path(name) for name in found]


class ShardSource:
    """The samples of a source, by draw.

    A process holds the number of samples of each shard and the order of a block; rows of the indexes are read where
    they are needed, from at most twice `block_shards` open files.

    Args:
        config: what to read.
        seed: of the order.
        cache: where indexes are kept; None = `cache_dir()`. A shard is indexed by the first process that needs it.

    Raises:
        ValueError: no shards, or no usable sample in any of them.
    """

    def __init__(self, config: SourceConfig, *, seed: int = 0, cache: Path | None = None) -> None:
        self.config, self.cache = config, cache or cache_dir()
        self.shards = expand(config.path)
        self._open: OrderedDict[int, ShardIndex] = OrderedDict()
        self._owner = os.getpid()
        sizes = [0] * len(self.shards)
        first = os.getpid() % len(sizes)  # ranks that start together begin apart, and find what others have indexed
        for shard in (*range(first, len(sizes)), *range(first)):
            sizes[shard] = self._index(shard).num_samples
        if not sum(sizes):
            bad = next(self.skipped(), None)
            raise ValueError(
                f"source {config.name!r}: no usable sample in {len(sizes)} shards of {config.path}"
                + (f"; the first: {bad.key or bad.shard}: {bad.reason} ({bad.detail})" if bad else "")
            )
        self.order = BlockShuffle(sizes, seed=seed, name=config.name, block_shards=config.block_shards)

    @property
    def num_samples(self) -> int:
        """Usable samples of an epoch."""
        return self.order.num_samples

    @property
    def sizes(self) -> Sequence[int]:
        """Usable samples of each shard."""
        return [int(size) for size in self.order.sizes]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, draw: int) -> Conversation | Skipped:
        """Read the sample of a draw; draws go on through the epochs."""
        return self.sample(*self.order[draw])

    def sample(self, shard: int, number: int) -> Conversation | Skipped:
        """Read a sample by its place."""
        path, located = self.shards[shard], self.located(shard, number)
        try:
            return self._reader(path).read(path, located)
        except RecordError as error:
            return Skipped(shard=str(path), key=located.key, reason=error.reason, detail=error.detail)

    def located(self, shard: int, number: int) -> Located:
        """Return where a sample's parts lie, and the sizes of its images."""
        return self._index(shard)[number]

    def stamp(self, shard: int) -> str:
        """Return a text that changes when a shard does."""
        return stamp_of(self.shards[shard])

    def where(self, draw: int) -> tuple[str, str]:
        """Return shard and key of a draw."""
        shard, number = self.order[draw]
        return str(self.shards[shard]), self._index(shard)[number].key

    def image_sizes(self, draw: int) -> tuple[tuple[int, int], ...]:
        """Return (width, height) in pixels of each image of a draw, from the index."""
        shard, number = self.order[draw]
        return self._reader(self.shards[shard]).sizes(self._index(shard)[number])

    def skipped(self) -> Iterator[Skipped]:
        """List what was left out while indexing, shard by shard."""
        for shard in range(len(self.shards)):
            yield from self.skipped_of(shard)

    def skipped_of(self, shard: int) -> Iterator[Skipped]:
        """List what was left out while indexing a shard."""
        yield from self._index(shard).skipped(str(self.shards[shard]))

    def _reader(self, shard: Path) -> ShardReader:
        root = Path(self.config.root).expanduser() if self.config.root else (shard if shard.is_dir() else shard.parent)
        config = self.config
        return ShardReader(
            root=root, source=config.name, caption_prompt=config.caption_prompt, max_frames=config.max_frames
        )

    def _index(self, shard: int) -> ShardIndex:
        if self._owner != os.getpid():  # a forked worker: SQLite's connections do not cross a fork
            self._open, self._owner = OrderedDict(), os.getpid()
        if shard not in self._open:
            path = self.shards[shard]
            self._open[shard] = open_index(path, self._reader(path), self.cache)
            if len(self._open) > 2 * self.config.block_shards:  # a window may reach into the next block
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard]
