"""Micro-batches filled to a budget of positions and images, as many samples as fit: a pure function of their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from fastmllm.data.packing_journal import Filled, Journal
from fastmllm.data.shard_index import Skipped

LANES = 16  # for each micro-batch of a step: what so many workers share out without looking at each other's samples
LOOKAHEAD = 32  # samples of a lane that wait for a place
PATIENCE = 256  # unusable samples in a row that are no accident


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a micro-batch holds.

    Args:
        max_tokens: positions, visual tokens included.
        max_images: images, each time that one is shown; 0 = any number.
    """

    max_tokens: int
    max_images: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.max_images < 0:
            raise ValueError(f"packer: {self}: give at least 1 position, and no negative number of images")


@dataclass(frozen=True, slots=True)
class Size:
    """What a sample takes of a budget.

    Args:
        text: positions without those of images, but for models whose images differ in size: there with them.
        images: shown in it.
    """

    text: int
    images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How samples are packed.

    Args:
        budget: of a micro-batch.
        size_of: sample -> what it takes; its TextError or ImageError leaves it out.
        tokens_an_image: micro-batch -> visual tokens of each of its images.
        most_tokens_an_image: of any micro-batch.
    """

    budget: Budget
    size_of: Callable[[Any], Size]
    tokens_an_image: Callable[[int], int]
    most_tokens_an_image: int

    def identity(self) -> tuple[int, ...]:
        """Return what the order depends on, beside samples and their tokens."""
        first = (self.tokens_an_image(index) for index in range(8))
        return self.budget.max_tokens, self.budget.max_images, LANES, LOOKAHEAD, self.most_tokens_an_image, *first

    def packer(
        self, size: Callable[[int], Size | Skipped], name: Callable[[int], tuple[str, str]], micro_batches: int
    ) -> Packer:
        """Return what fills micro-batches with draws: their sizes, their names, micro-batches of a step."""
        return Packer(
            size, self.budget, lanes=LANES * micro_batches, tokens_an_image=self.tokens_an_image,
            most_tokens_an_image=self.most_tokens_an_image, name=name,
        )  # fmt: skip


class Packer:
    """Fill micro-batches, first fit with bounded look-ahead.

    Draws are dealt out to lanes, draw d to lane d modulo their number, and so are micro-batches: what one holds depends
    on its lane alone, so that a rank or worker looks at few samples of others. The oldest sample that waits in a lane
    always goes, then each younger one that fits: none waits for more than `LOOKAHEAD` micro-batches of its lane, and
    none goes before its turn by more than `LOOKAHEAD` samples of it. What fits into no micro-batch is left out.

    A run that goes on fills its lanes again from where the journal has them, else from the start: the journal saves
    time, and changes nothing.

    Args:
        size_of: a draw -> its size, or why it cannot be used.
        budget: of a micro-batch.
        lanes: their number; the same for any ranks and workers.
        tokens_an_image: micro-batch -> visual tokens of each of its images.
        most_tokens_an_image: of any micro-batch.
        name: a draw -> (shard, key), for the list of what was left out.
        journal: of a run that may be resumed.
    """

    def __init__(
        self,
        size_of: Callable[[int], Size | Skipped],
        budget: Budget,
        *,
        lanes: int,
        tokens_an_image: Callable[[int], int],
        most_tokens_an_image: int,
        name: Callable[[int], tuple[str, str]],
        journal: Journal | None = None,
    ) -> None:
        self.size_of, self.budget, self.lanes, self.name, self.journal = size_of, budget, lanes, name, journal
        self.tokens_an_image, self.most = tokens_an_image, most_tokens_an_image
        self._last: dict[int, Filled] = {}  # by lane
        self._sizes: dict[int, Size] = {}  # of what waits

    def __call__(self, index: int) -> Filled:
        """Return micro-batch `index`, from 0.

        Raises:
            ValueError: `PATIENCE` samples in a row cannot be used.
        """
        lane = index % self.lanes
        last = self._last.get(lane)
        if last is None or last.index > index:
            last = self._restored(lane, index)
        while last.index < index:
            last = self._fill(last)
        self._last[lane] = last
        return last

    def behind(self, index: int) -> Iterator[int]:
        """Yield draws of the lane that come later and would fit into micro-batch `index` alone."""
        last, each = self(index), self.tokens_an_image(index)
        for number in islice(count(last.pulled), PATIENCE):
            draw = number * self.lanes + index % self.lanes
            size = self._size(draw)
            if isinstance(size, Size) and self._fits(size, each):
                yield draw

    def _fill(self, last: Filled) -> Filled:
        index = last.index + self.lanes
        lane, each = index % self.lanes, self.tokens_an_image(index)
        waiting, pulled, skipped = list(last.waiting), last.pulled, []
        while len(waiting) < LOOKAHEAD:
            draw = pulled * self.lanes + lane
            pulled += 1
            if isinstance(size := self._size(draw), Size):
                self._sizes[draw] = size
                waiting.append(draw)
                continue
            skipped.append(size)
            if len(skipped) >= PATIENCE and waiting:
                break  # go on with what there is
            if len(skipped) >= PATIENCE:
                raise ValueError(
                    f"packer: {PATIENCE} samples in a row are unusable for micro-batch {index}; the last: {size.shard} "
                    f"{size.key}: {size.reason} ({size.detail}); mend the source, or raise max_tokens or max_images"
                )
        draws, tokens, images = [], 0, 0
        for draw in waiting:
            size = self._sizes.get(draw) or self._size(draw)
            assert isinstance(size, Size)  # it was, when it began to wait
            together = Size(text=tokens + size.text + size.images * each, images=images + size.images)
            if self._fits(together, 0):
                draws.append(draw)
                tokens, images = together.text, together.images
                self._sizes.pop(draw, None)
        left = tuple(draw for draw in waiting if draw not in draws)
        return Filled(index=index, draws=tuple(draws), skipped=tuple(skipped), pulled=pulled, waiting=left)

    def _fits(self, size: Size, each: int) -> bool:
        most = self.budget.max_images
        return size.text + size.images * each <= self.budget.max_tokens and (not most or size.images <= most)

    def _size(self, draw: int) -> Size | Skipped:
        size = self.size_of(draw)
        if isinstance(size, Skipped) or self._fits(size, self.most):
            return size
        shard, key = self.name(draw)
        detail = (
            f"{size.text + size.images * self.most} positions and {size.images} images, a micro-batch holds "
            f"{self.budget.max_tokens} and {self.budget.max_images or 'any number'}"
        )
        return Skipped(shard=shard, key=key, reason="larger than the budget", detail=detail)

    def _restored(self, lane: int, index: int) -> Filled:
        """Return the newest known state of a lane before a micro-batch."""
        found = None if self.journal is None else self.journal.before(lane, index)
        return Filled(index=lane - self.lanes) if found is None else found
