"""Micro-batches from sources of any size: a pure function of their number, whatever the ranks and workers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastmllm.data.balance import BatchPlan, balance, spread
from fastmllm.data.images import ImageError
from fastmllm.data.mixture import Schedule
from fastmllm.data.packer import PATIENCE, Packing, Size
from fastmllm.data.packing_journal import Filled, Journal
from fastmllm.data.sample import Conversation
from fastmllm.data.shard_index import Skipped
from fastmllm.data.shards import ShardSource
from fastmllm.data.text import TextError

T = TypeVar("T")
Sizes = tuple[tuple[int, int], ...]  # (width, height) of each image of a sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn(Generic[T]):
    """A micro-batch.

    Args:
        index: its number.
        items: what `load` made of its samples.
        skipped: samples of it that were left out.
        scored: False where nothing of it could be used: its one item is another micro-batch's, from which nothing must
            be learned.
        work: visual tokens of the items, by the indexes' image sizes; 0 without `cost`.
        filled: how it was filled to a budget; None where it has a fixed number of samples.
    """

    index: int
    items: list[T]
    skipped: list[Skipped]
    scored: bool = True
    work: int = 0
    filled: Filled | None = None


class Stream(Generic[T]):
    """Draw micro-batches from sources by weight.

    Micro-batch n is (step * accumulation + micro-batch) * ranks + rank, as the trainer counts. Every source goes
    through all of its samples before any comes again, over the ranks together, and its next epoch follows without a
    gap: there is no remainder. A sample that turns out to be unusable leaves its place empty, so that all others stay
    where they are. A micro-batch of which nothing is left holds the next usable sample, so that its rank computes
    along; it is not scored, unless nothing is left of the whole step, which must have something to learn from.

    Args:
        sources: by name; all with a weight, or none, which weighs them by their samples.
        load: (sample, number of its micro-batch) -> what is collated (`rows.prepare`); its TextError or ImageError
            skips the sample.
        plan: sizes and seed.
        cost: visual tokens of a sample by its images' sizes; needed for `plan.window`.
        packing: fills micro-batches to a budget instead of with `plan.batch_size` samples.

    Raises:
        ValueError: no sources, one name twice, some weights only, or a window without cost.
    """

    def __init__(
        self,
        sources: Sequence[ShardSource],
        load: Callable[[Conversation, int], T],
        plan: BatchPlan,
        *,
        cost: Callable[[Sizes], int] | None = None,
        packing: Packing | None = None,
    ) -> None:
        names = [source.config.name for source in sources]
        weights = [source.config.weight for source in sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"stream: sources need distinct names, and at least one source, got {names}")
        if any(w is None for w in weights) and any(w is not None for w in weights):
            raise ValueError(f"stream: weights {dict(zip(names, weights, strict=True))}: give all sources one, or none")
        if plan.window and cost is None:
            raise ValueError("stream: a window arranges samples by their cost; give `cost`, or window 0")
        self.sources, self.load, self.plan, self.cost = list(sources), load, plan, cost
        known = [float(s.num_samples) if w is None else w for s, w in zip(sources, weights, strict=True)]
        self.schedule = Schedule(known, seed=plan.seed)
        self._arranged = lru_cache(maxsize=2)(self._arrange)
        if packing is not None and plan.window:
            raise ValueError("stream: a window arranges a fixed number of samples; give a window or a budget")
        self.packing = packing
        self.journal: Journal | None = None
        self._packer = None if packing is None else packing.packer(self._size, self._where, plan.micro_batches)

    def __reduce__(self) -> tuple[Any, ...]:
        return _stream, (self.sources, self.load, self.plan, self.cost, self.packing, self.journal)

    def keep_journal(self, folder: Path, rank: int) -> None:
        """Write down where packing stands in a folder, and go on from what stands there."""
        if self._packer is not None:
            self.journal = self._packer.journal = Journal(folder, rank, self._packer.lanes, self.identity())

    def __call__(self, index: int) -> Drawn[T]:
        """Return micro-batch `index`, from 0.

        Raises:
            ValueError: `PATIENCE` samples in a row are unusable.
        """
        filled = None if self._packer is None else self._packer(index)
        items, skipped, work = self._take(self._draws(index), index)
        if self.plan.full:
            items = self._completed(items, skipped, index)
        skipped = [*(() if filled is None else filled.skipped), *skipped]
        if items:
            return Drawn(index=index, items=items, skipped=skipped, work=work, filled=filled)
        others = skipped
        for draw in islice(self._behind(index), PATIENCE):
            items, others, work = self._take([draw], index)
            if items:
                scored = self._is_empty(index)
                return Drawn(index=index, items=items, skipped=skipped, scored=scored, work=work, filled=filled)
        raise self._exhausted(index, others[0])

    def _completed(self, items: list[T], skipped: list[Skipped], index: int) -> list[T]:
        """Bring a micro-batch to `batch_size` items: by samples of later steps, other ones for each of this step's."""
        plan, last = self.plan, skipped[-1:]
        step, number = divmod(index, plan.micro_batches)
        first = (step + 1) * plan.micro_batches * plan.batch_size + number
        for draw in islice(count(first, plan.micro_batches), PATIENCE):
            if len(items) == plan.batch_size:
                return items
            found, lost, _ = self._take([draw], index)
            items, last = items + found, lost or last
        raise self._exhausted(index, last[0])

    def _exhausted(self, index: int, last: Skipped) -> ValueError:
        return ValueError(
            f"stream: micro-batch {index} and {PATIENCE} samples behind it are unusable; the last: {last.shard} "
            f"{last.key}: {last.reason} ({last.detail}); mend the source or leave it out"
        )

    def spread(self, step: int) -> float:
        """Return by how much the busiest rank's vision work of a step is above the mean; no rank need be asked.

        Args:
            step: from 0.
        """
        work = [0] * self.plan.ranks
        for number in range(self.plan.micro_batches):
            draws = self._draws(step * self.plan.micro_batches + number)
            work[number % self.plan.ranks] += sum(self._cost(draw) for draw in draws)
        return spread(work)

    def state(self, index: int) -> dict[str, Any]:
        """Describe where the sources stand before micro-batch `index`, JSON-able.

        Returns:
            The index, the ranks, an identity of all that the order depends on, and epoch and position of each source:
            how many of its samples the draws before have taken (arranged in windows: those of the windows before).
            Filled to a budget, no position: lanes go on at their own pace, by `packing_journal`.
        """
        if self._packer is not None:
            return {"index": index, "ranks": self.plan.ranks, "identity": self.identity(), "sources": {}}
        group = self.plan.micro_batches * self.plan.window or 1
        draws = index // group * group * self.plan.batch_size
        taken = self.schedule.taken(draws)
        at = {
            s.config.name: dict(zip(("epoch", "position"), divmod(n, s.num_samples), strict=True))
            for s, n in zip(self.sources, taken, strict=True)
        }
        return {"index": index, "ranks": self.plan.ranks, "identity": self.identity(), "sources": at}

    def identity(self) -> str:
        """Return a hash of what the order of the samples depends on: names, sizes, weights, seeds and batches."""
        parts = [(s.config.name, s.config.block_shards, s.order.seed, s.sizes) for s in self.sources]
        arranged = (self.plan.micro_batches, self.plan.window) if self.plan.window else ()
        packed = () if self.packing is None else (self.plan.micro_batches, self.packing.identity())
        full = ("full", self.plan.micro_batches) if self.plan.full else ()
        known = (self.plan.batch_size, self.plan.seed, arranged, self.schedule.weights, parts, *packed, *full)
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    def skipped(self) -> Iterator[Skipped]:
        """List what was left out while indexing, source by source."""
        for source in self.sources:
            yield from source.skipped()

    def _draws(self, index: int) -> Sequence[int]:
        if self._packer is not None:
            return self._packer(index).draws
        size = self.plan.batch_size
        if not self.plan.window:
            return range(index * size, (index + 1) * size)
        window, at = divmod(index, self.plan.window * self.plan.micro_batches)
        return self._arranged(window)[at * size : (at + 1) * size]

    def _behind(self, index: int) -> Iterator[int]:
        if self._packer is not None:
            return self._packer.behind(index)
        return count((index + 1) * self.plan.batch_size)

    def _where(self, draw: int) -> tuple[str, str]:
        number, seen = self.schedule(draw)
        return self.sources[number].where(seen)

    def _size(self, draw: int) -> Size | Skipped:
        assert self.packing is not None
        number, seen = self.schedule(draw)
        if isinstance(sample := self.sources[number].read(seen), Skipped):
            return sample
        try:
            return self.packing.size_of(sample)
        except (ImageError, TextError) as error:
            return self._unusable(draw, error)

    def _unusable(self, draw: int, error: Exception) -> Skipped:
        shard, key = self._where(draw)
        reason = "undecodable image" if isinstance(error, ImageError) else "unusable text"
        return Skipped(shard=shard, key=key, reason=reason, detail=str(error))

    def _is_empty(self, index: int) -> bool:
        first = index - index % self.plan.micro_batches
        step = range(first, first + self.plan.micro_batches)
        return not any(self._take(self._draws(number), number)[0] for number in step)

    def _arrange(self, window: int) -> list[int]:
        plan = self.plan
        num = plan.window * plan.micro_batches * plan.batch_size
        order = balance([self._cost(draw) for draw in range(window * num, (window + 1) * num)], plan, window)
        return [window * num + item for item in order]

    def _cost(self, draw: int) -> int:
        if self.cost is None:
            return 0
        number, seen = self.schedule(draw)
        return self.cost(self.sources[number].image_sizes(seen))

    def _take(self, draws: Sequence[int], index: int) -> tuple[list[T], list[Skipped], int]:
        """Read and load samples; return those, what was left out, and the work."""
        items: list[T] = []
        skipped: list[Skipped] = []
        work = 0
        for draw in draws:
            number, seen = self.schedule(draw)
            source = self.sources[number]
            if isinstance(sample := source.read(seen), Skipped):
                skipped.append(sample)
                continue
            try:
                items.append(self.load(sample, index))
                work += self._cost(draw)
            except (ImageError, TextError) as error:
                skipped.append(self._unusable(draw, error))
        return items, skipped, work


def _stream(*given: Any) -> Stream[Any]:
    sources, load, plan, cost, packing, journal = given
    made = Stream(sources, load, plan, cost=cost, packing=packing)
    if journal is not None:
        made.keep_journal(journal.folder, journal.rank)
    return made
