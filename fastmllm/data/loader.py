"""Micro-batches of one rank, made ahead by worker processes; where it stands is saved and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastmllm.data.stream import Drawn, Stream

T = TypeVar("T")
B = TypeVar("B")


class _Batches(Dataset[Any], Generic[T, B]):
    def __init__(self, stream: Stream[T], join: Callable[[Drawn[T]], B]) -> None:
        self.stream, self.join = stream, join

    def __getitem__(self, index: int) -> tuple[Drawn[None], B]:
        drawn = self.stream(index)
        # what a worker sends twice, the parent holds twice: the items go inside of the batch alone
        left: Drawn[None] = replace(drawn, items=[])  # type: ignore[assignment,arg-type]
        return left, self.join(drawn)


class _From(Sampler[int]):
    def __init__(self, first: int, stride: int) -> None:
        self.first, self.stride = first, stride

    def __iter__(self) -> Iterator[int]:
        return count(self.first, self.stride)


class Loader(Generic[T, B]):
    """Give the micro-batches of a rank one after the other, without end.

    They are the stream's for any number of workers. `loader.at` is what `Trainer` takes as `batches`.

    Args:
        stream: of the samples; goes to the workers without open files.
        join: makes the batch, in the worker.
        rank: of this process; ranks are those of the stream's plan.
        workers: processes; 0 = none.
        on_batch: called in this process with each micro-batch as it is given out, `items` left empty: to log what was
            skipped and the work.

    Raises:
        ValueError: no such rank.
    """

    def __init__(
        self,
        stream: Stream[T],
        join: Callable[[Drawn[T]], B],
        *,
        rank: int = 0,
        workers: int = 0,
        on_batch: Callable[[Drawn[None]], None] | None = None,
    ) -> None:
        if not 0 <= rank < stream.plan.ranks or workers < 0:
            raise ValueError(f"loader: rank {rank} of {stream.plan.ranks}, {workers} workers: no such rank or number")
        self.stream, self.join, self.rank, self.workers, self.on_batch = stream, join, rank, workers, on_batch
        self.index = rank  # of the next micro-batch
        self._ahead: Iterator[tuple[Drawn[None], B]] | None = None

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        return self.at(self.index)

    def at(self, index: int) -> B:
        """Return a micro-batch by its number; the next one of this rank is on its way, any other starts afresh."""
        if self._ahead is None or index != self.index:
            self.close()
            loader = DataLoader(
                _Batches(self.stream, self.join),
                batch_size=None,
                sampler=_From(index, self.stream.plan.ranks),
                num_workers=self.workers,
                generator=torch.Generator(),  # else it draws from the trainer's, and a resumed run differs
            )
            self._ahead = iter(loader)
        drawn, batch = next(self._ahead)
        self.index = index + self.stream.plan.ranks
        if self.stream.journal is not None and drawn.filled is not None:
            self.stream.journal.note(drawn.filled)
        if self.on_batch is not None:
            self.on_batch(drawn)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return where the ranks stand once all have taken as many micro-batches as this one; JSON-able."""
        return self.stream.state(self.index - self.rank)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of any rank of a run with any number of workers.

        Raises:
            ValueError: of other sources, weights, seeds or batches, which would be another order, or between the ranks.
        """
        if state["identity"] != self.stream.identity():
            raise ValueError(
                f"loader: the state is of another stream ({state['identity']}, this is {self.stream.identity()}): give "
                "the same sources, weights, seed and batch size, or start without a state"
            )
        plan = self.stream.plan
        # as drawn, a round of ranks is enough; an arranged step is another one for another number of ranks
        whole = plan.micro_batches if plan.window and state["ranks"] != plan.ranks else plan.ranks
        if state["index"] % whole:
            raise ValueError(
                f"loader: {state['index']} micro-batches on {state['ranks']} ranks are no whole rounds of {whole} on "
                f"{plan.ranks} ranks; resume from the end of a step, with as many micro-batches in it"
            )
        self.close()
        self.index = int(state["index"]) + self.rank

    def close(self) -> None:
        """Stop the workers."""
        self._ahead = None
