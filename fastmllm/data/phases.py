"""A curriculum within a stage: mixtures, resolutions and token budgets that change over its steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastmllm.data.mixture import MixtureSampler
from fastmllm.data.sample import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of a stage.

    Args:
        share: of the stage's steps, in any unit: 2 lasts twice as long as 1.
        mixture: task -> weight of the questions drawn; empty = by their number.
        image_size: side of the square that images are resized to, pixels; None = the stage's.
        visual_tokens: token counts an image may take, one drawn a micro-batch; empty = the stage's.
    """

    share: float
    mixture: Mapping[str, float] = field(default_factory=dict)
    image_size: int | None = None
    visual_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.share < float("inf"):
            raise ValueError(f"phase: share must be above 0, got {self.share}; leave the phase out")
        if (self.image_size is not None and self.image_size < 1) or any(count < 1 for count in self.visual_tokens):
            raise ValueError(f"phase: image_size {self.image_size} and visual_tokens {self.visual_tokens}: 1 or more")


def ends_of(phases: Sequence[Phase], steps: int) -> list[int]:
    """Return the step at which each phase ends, the last at `steps`.

    Raises:
        ValueError: a phase without a step.
    """
    total, sum_, ends = sum(phase.share for phase in phases), 0.0, []
    for phase in phases:
        sum_ += phase.share
        ends.append(round(steps * sum_ / total))
    if any(b <= a for a, b in zip([0, *ends], ends, strict=False)):
        raise ValueError(f"phases: of {steps} steps they end at {ends}: one has none; give more steps or fewer phases")
    return ends


class PhasedMixture:
    """Draw micro-batches from tasks by the weights of the present phase, without any state.

    A task goes on in its order where the phase before left it: all of its samples come once before any comes again.

    Args:
        samples: task -> samples.
        phases: at least one.
        steps: of the stage.
        micro_batches: of a step, over all ranks.
        batch_size: samples of a micro-batch.
        seed: of every order.

    Raises:
        ValueError: as `MixtureSampler`; a phase without a step.
    """

    def __init__(
        self, samples: Mapping[str, Sequence[Sample]], phases: Sequence[Phase], *, steps: int, micro_batches: int,
        batch_size: int, seed: int = 0,
    ) -> None:  # fmt: skip
        self.phases, self.batch_size = tuple(phases), batch_size
        self._ends = [end * micro_batches for end in ends_of(phases, steps)]  # in micro-batches
        self._mixtures = [
            MixtureSampler(samples, phase.mixture or None, batch_size=batch_size, seed=seed) for phase in phases
        ]
        taken: dict[str, int] = {}
        self._before: list[dict[str, int]] = []  # draws of each task before a phase
        for mixture, start, end in zip(self._mixtures, [0, *self._ends], self._ends, strict=False):
            self._before.append(dict(taken))
            counts = mixture.schedule.taken((end - start) * batch_size)
            for task, count in zip(mixture.tasks, counts, strict=True):
                taken[task] = taken.get(task, 0) + count

    def phase(self, index: int) -> Phase:
        """Return the phase of micro-batch `index`; the last one goes on."""
        return self.phases[self._number(index)]

    def batch_samples(self, index: int) -> list[Sample]:
        """Return the samples of micro-batch `index`, from 0."""
        number = self._number(index)
        mixture, before = self._mixtures[number], self._before[number]
        first = (index - (self._ends[number - 1] if number else 0)) * self.batch_size
        chosen = []
        for draw in range(first, first + self.batch_size):
            task, seen = mixture.schedule(draw)
            chosen.append(mixture.sample(task, seen + before.get(mixture.tasks[task], 0)))
        return chosen

    def _number(self, index: int) -> int:
        if index < 0:
            raise ValueError(f"phases: micro-batch must be 0 or more, got {index}")
        return min(bisect_right(self._ends, index), len(self.phases) - 1)


def growing(order: Sequence[str], *, newest: float = 0.5) -> tuple[Phase, ...]:
    """Return phases that add one task after the other, with the earlier ones kept alive.

    Args:
        order: tasks, the first to learn first.
        newest: share of a phase's draws that its new task gets; the others share the rest.

    Raises:
        ValueError: no tasks, or a share outside of 0..1.
    """
    if not order or not 0.0 < newest <= 1.0:
        raise ValueError(f"phases: {len(order)} tasks, newest {newest}: give a task, and a share above 0 and at most 1")
    phases = []
    for number, task in enumerate(order):
        old = dict.fromkeys(order[:number], (1.0 - newest) / max(number, 1)) if newest < 1.0 else {}
        phases.append(Phase(share=1.0, mixture={**old, task: newest}))
    return tuple(phases)


def exposure(phases: Sequence[Phase]) -> dict[str, float]:
    """Return the share of all draws that each task gets: the mixture of a shuffled run with the same samples."""
    total, found = sum(phase.share for phase in phases), dict[str, float]()
    for phase in phases:
        for task, weight in phase.mixture.items():
            found[task] = found.get(task, 0.0) + phase.share / total * weight / sum(phase.mixture.values())
    return found


def levels(samples: Sequence[Sample], difficulty: Sequence[float], count: int) -> dict[str, list[Sample]]:
    """Cut samples into equally many of each difficulty, as tasks "level 0" (easiest), ... of a mixture.

    Args:
        samples: of any task.
        difficulty: of each, such as its loss under an early model (`infer.answer_loss`).
        count: of levels.

    Raises:
        ValueError: lengths differ, or fewer samples than levels.
    """
    if len(samples) != len(difficulty) or not 1 <= count <= len(samples):
        raise ValueError(f"levels: {len(samples)} samples, {len(difficulty)} difficulties, {count} levels do not fit")
    order = sorted(range(len(samples)), key=lambda i: difficulty[i])
    edges = [len(order) * i // count for i in range(count + 1)]
    return {f"level {i}": [samples[k] for k in order[edges[i] : edges[i + 1]]] for i in range(count)}
