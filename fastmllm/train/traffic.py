"""What ranks send each other in a step, as pure functions: the collectives of each ZeRO stage, and their rings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastmllm.train.plan import LIVE, SMALL, Layout, ParamSize


@dataclass(frozen=True, slots=True)
class Collective:
    """What the ranks do together in a step.

    Args:
        kind: "all-reduce", "reduce-scatter" or "all-gather".
        what: is sent.
        payload: bytes of the whole tensors, over the step.
    """

    kind: str
    what: str
    payload: int

    def traffic(self, layout: Layout) -> tuple[int, int]:
        """Return the bytes that a rank sends inside of its node, and to other nodes.

        A ring over N ranks makes a rank send (N - 1) / N of the payload, an all-reduce twice that. The hierarchical
        ring splits the same sum: (g - 1) / g among the g ranks of a node, then (n - 1) / n of a g-th between n nodes.
        """
        inside = min(layout.ranks, layout.ranks_per_node)
        nodes = layout.ranks // inside
        passes = 2 if self.kind == "all-reduce" else 1
        near, far = self.payload * (inside - 1) / inside, self.payload / inside * (nodes - 1) / nodes
        return round(passes * near), round(passes * far)


def collectives(params: Sequence[ParamSize], layout: Layout, backward_elements: int | None = None) -> list[Collective]:
    """Return what is communicated in a step, all micro-batches together.

    Args:
        params: the model's.
        layout: how they are spread.
        backward_elements: of parameters in the way of gradients, which stage 3 gathers again; None: all.
    """
    engine = layout.engine
    if layout.ranks == 1:
        return []
    learning = sum(param.numel * param.itemsize for param in params if param.group is not None)
    if engine.zero_stage == 0:
        return [Collective("all-reduce", "gradients", learning)]
    if engine.zero_stage < 3:
        times = 1 if engine.zero_stage == 1 else engine.accumulation
        return [
            Collective("all-reduce", "gradients", learning * times),
            Collective("all-gather", "updated parameters", learning),
        ]
    sharded = [param for param in params if param.numel > SMALL]
    forward, elements = sum(p.numel * p.itemsize for p in sharded), sum(p.numel for p in sharded)
    again = elements if backward_elements is None else min(backward_elements, elements)
    # what comes back within the reuse distance is kept: counted on the way to the end of the model and back
    released = max(0, again - LIVE // 2)
    small = sum(param.numel * param.itemsize for param in params if param.numel <= SMALL)
    return [
        Collective("all-gather", "parameters, forward", forward * engine.accumulation),
        Collective("all-gather", "parameters, backward", forward * released // max(elements, 1) * engine.accumulation),
        Collective("reduce-scatter", "gradients", learning * engine.accumulation),
        Collective("all-gather", "small parameters", small),
    ]
