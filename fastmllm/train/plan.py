"""What ZeRO holds and sends on each rank, as pure functions: bytes by stage, dtype and offload; no model is needed.

The formulas are those of Rajbhandari et al. (arXiv 1910.02054) as DeepSpeed 0.19 carries them out, which is more than
the paper's: fp32 has a master copy as well from stage 1 on, a parameter that lies across two ranks' shares keeps its
whole gradient on both, gradients are all-reduced rather than reduce-scattered at stages 1 and 2, small parameters stay
on every rank at stage 3. tests/train/test_plan.py holds them against measured bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from fastmllm.train.engine import EngineConfig

MASTER, MOMENTS = 4, 8  # bytes of an element: fp32 weight; AdamW's two fp32 averages
SMALL = 100_000  # elements; DeepSpeed's stage3_param_persistence_threshold
LIVE = 1_000_000_000  # elements; its stage3_max_live_parameters, stage3_max_reuse_distance and sub_group_size
FLAT_REDUCE = 500_000_000  # elements that stage 0 copies side by side to all-reduce them


@dataclass(frozen=True, slots=True)
class ParamSize:
    """A parameter.

    Args:
        numel: elements.
        itemsize: bytes of one, on the device.
        group: of the optimizer; None is frozen.
    """

    numel: int
    itemsize: int
    group: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a step is spread.

    Args:
        engine: ZeRO stage, offload, accumulation and bucket; its dtype is not read (`ParamSize.itemsize` has it).
        ranks: N.
        ranks_per_node: of them in one machine; divides N, or N is smaller.
    """

    engine: EngineConfig
    ranks: int
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.ranks_per_node < 1:
            raise ValueError(f"plan: {self.ranks} ranks, {self.ranks_per_node} a node: both must be at least 1")
        if self.ranks > self.ranks_per_node and self.ranks % self.ranks_per_node:
            raise ValueError(
                f"plan: {self.ranks} ranks are no whole number of nodes of {self.ranks_per_node}; change --gpus, or "
                "--gpus-per-node"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """Bytes of the rank that holds most.

    Args:
        parameters: as the forward pass reads them; at stage 3 its shares, and small parameters whole.
        masters, moments: fp32 weights and AdamW's averages of its share.
        gradients: after the last backward pass, before the step.
        backward: beyond parameters, masters, moments: gradients and buckets at the worst moment of a backward pass.
        update: the same in the optimizer's step.
        gathered: parameters of other ranks that are here at once in a pass (stage 3).
        host: in the memory of the machine, for this rank (offload).
        start: while parameters come to the device, before anything else is there: all of them; at stage 3 the shares,
            beside the largest whole.
    """

    parameters: int
    masters: int
    moments: int
    gradients: int
    backward: int
    update: int
    gathered: int
    host: int
    start: int

    def total(self, activations: int) -> int:
        """Return the most that is there at once: in the passes, in the step, when activations are gone, or before."""
        passes = self.backward + self.gathered + activations
        return max(self.start, self.parameters + self.masters + self.moments + max(passes, self.update))


def param_sizes(model: nn.Module, groups: Sequence[Mapping[str, Any]], dtype: str) -> list[ParamSize]:
    """List a model's parameters as the engine will hold them, in the optimizer's order, the frozen ones last.

    Args:
        model: on any device, "meta" too.
        groups: of `rules.apply_rules`.
        dtype: of the engine; "bfloat16" casts all, others nothing.
    """
    number = {param: k for k, group in enumerate(groups) for param in group["params"]}
    frozen = [param for param in model.parameters() if param not in number]
    return [
        ParamSize(param.numel(), 2 if dtype == "bfloat16" else param.element_size(), number.get(param))
        for param in (*number, *frozen)
    ]


def state_bytes(params: Sequence[ParamSize], layout: Layout) -> StateBytes:
    """Return what a rank holds besides activations.

    Args:
        params: the model's; those of a group lie behind each other in the order of the list.
        layout: how they are spread.
    """
    engine, ranks = layout.engine, layout.ranks
    groups = _groups(params)
    size = max((param.itemsize for group in groups for param in group), default=4)
    learning = sum(param.numel for group in groups for param in group)
    largest = max((param.numel for group in groups for param in group), default=0) * size
    bucket = min(engine.bucket_elements, learning) * size
    whole = start = sum(param.numel * param.itemsize for param in params)
    if engine.zero_stage == 0:
        held = learning * size
        return StateBytes(
            parameters=whole, masters=0, moments=learning * MOMENTS, gradients=held,
            backward=held + min(learning, FLAT_REDUCE) * size, update=held, gathered=0, host=0, start=start,
        )  # fmt: skip
    if engine.zero_stage == 3:
        shares = [sum(-(-param.numel // ranks) for param in group) for group in groups]
        small = sum(param.numel * param.itemsize for param in params if param.numel <= SMALL) if ranks > 1 else 0
        parameters = sum(-(-param.numel // ranks) * param.itemsize for param in params) + small
        start = parameters - small + max(param.numel * param.itemsize for param in params)
        held = sum(shares) * size
        # a gradient is whole until its bucket is reduced
        backward, gathered = held + bucket + largest, _gathered(params, ranks)
        fixed = bucket  # the bucket is never freed
    else:
        shares = [-(-sum(param.numel for param in group) // (2 * ranks)) * 2 for group in groups]
        parameters, gathered, fixed = whole, 0, 0
        held = _overlapping(groups, shares, ranks) * size
        if engine.zero_stage == 1:  # all gradients are whole until the last is there
            backward = held + learning * size + bucket
        else:  # two sets of shares where micro-batches are added up
            backward = held * (2 if engine.accumulation > 1 else 1) + bucket + 2 * largest
    share = sum(shares)
    # the optimizer updates a group, or a part of one, at a time, from gradients in fp32
    step = min(max(shares, default=0), LIVE) * (MASTER + (size if size < MASTER else 0))
    masters, moments, update = share * MASTER, share * MOMENTS, held + step + fixed
    host = 0
    if engine.offload == "cpu":
        # gradients in fp32 and, at stage 2, the new weights and the largest gradient in their dtype, at stage 3 the
        # shares of the gradients
        host = masters + moments + share * MASTER + (share * size + largest if engine.zero_stage == 2 else held)
        masters = moments = 0
        held = 0
        backward, update = bucket + 2 * largest, fixed + (largest if engine.zero_stage == 2 else 0)
    return StateBytes(
        parameters=parameters, masters=masters, moments=moments, gradients=held, backward=backward, update=update,
        gathered=gathered, host=host, start=start,
    )  # fmt: skip


def _groups(params: Iterable[ParamSize]) -> list[list[ParamSize]]:
    found: dict[int, list[ParamSize]] = {}
    for param in params:
        if param.group is not None:
            found.setdefault(param.group, []).append(param)
    return list(found.values())


def _overlapping(groups: Sequence[Sequence[ParamSize]], shares: Sequence[int], ranks: int) -> int:
    """Return the elements of all parameters that lie, in part at least, in the share of the rank that has most."""
    held = [0] * ranks
    for group, share in zip(groups, shares, strict=True):
        for param, end in zip(group, accumulate(param.numel for param in group), strict=True):
            if param.numel:
                for rank in range((end - param.numel) // share, min((end - 1) // share, ranks - 1) + 1):
                    held[rank] += param.numel
    return max(held)


def _gathered(params: Sequence[ParamSize], ranks: int) -> int:
    """Return the bytes of gathered parameters that stage 3 lets live at once."""
    sharded = [param for param in params if param.numel > SMALL]
    if ranks == 1 or not sharded:
        return 0
    size = max(param.itemsize for param in sharded)
    return min(sum(p.numel * p.itemsize for p in sharded), (LIVE + max(p.numel for p in sharded)) * size)
