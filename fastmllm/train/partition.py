"""Which elements of what learns a rank updates, at any ZeRO stage: views of DeepSpeed's buffers, by parameter name.

DeepSpeed's own checkpoints can be read by the same number of ranks at the same stage only; these views make a
checkpoint that knows neither (`pieces`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A run of elements of one flattened parameter, with its optimizer state.

    Args:
        name: of the parameter in the model.
        start: index of the first element.
        tensors: kind -> (n,) view that can be read and written: the master weights and Adam's two moments.
        step: (), Adam's count of steps; pieces may share it.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]
    step: Tensor


def partition(model: nn.Module, zero_stage: int, zero: Any, adamw: torch.optim.Optimizer) -> Iterator[Piece]:
    """Yield the pieces that this rank updates; at stage 0 that is everything, on every rank.

    Args:
        model: whose names count; behind an engine.
        zero_stage: of the engine.
        zero: its DeepSpeed optimizer.
        adamw: the torch optimizer inside.
    """
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if zero_stage == 0:
            flat, start, at, size = param, 0, 0, param.numel()
        elif zero_stage < 3:
            mapping = param._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # other ranks update all of it
                continue
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            at = mapping.hp_fragment_address.start
        else:
            group, at, size = zero.grad_position[zero.get_param_id(param)]
            flat, start = zero.fp32_partitioned_groups_flat[group], zero._get_param_partition_rank(param) * size
            size = min(size, param.ds_numel - start)  # type: ignore[attr-defined]  # behind it is padding
        if size <= 0:
            continue
        state = _adam_state(adamw, flat)
        whole = dict(zip(KINDS, (flat.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=True))
        tensors = {kind: value.view(-1).narrow(0, at, size) for kind, value in whole.items()}
        yield Piece(name=name, start=start, tensors=tensors, step=state["step"])


def share_of(piece: Piece, rank: int, ranks: int) -> Piece | None:
    """Return a rank's equal share of a piece that all ranks hold, None when nothing is left for it."""
    size = len(piece.tensors["master"])
    chunk = -(-size // ranks)
    start, end = min(rank * chunk, size), min((rank + 1) * chunk, size)
    if start == end:
        return None
    tensors = {kind: value[start:end] for kind, value in piece.tensors.items()}
    return Piece(name=piece.name, start=piece.start + start, tensors=tensors, step=piece.step)


def adopt_masters(zero_stage: int, zero: Any) -> None:
    """Make the parameters of the forward pass what the master weights say; called by all ranks."""
    if zero_stage in (1, 2):
        zero.update_lp_params()
    elif zero_stage == 3:
        zero.checkpoint_event_prologue()  # shares out the small parameters that every rank keeps whole
        for number, master in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[number].data.copy_(master.data)
            zero._unflatten_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()  # and gathers them again


def _adam_state(adamw: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    state: dict[str, Tensor] = adamw.state[master]
    if not state:  # AdamW makes the same in its first step
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(master.detach()) for _ in range(2))
    return state
