"""What a packed vision tower derives from its grids, made on the host after one read: positions, windows, lengths."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmllm.hf.fusion import Fusion

_MODULE = "transformers.vision_utils"  # loaded with every model that has such a tower
_LONGEST = {"cu_seqlens": "max_seqlen", "cu_window_seqlens": "max_window_seqlen"}
_Part = tuple[tuple[str, ...], str, tuple[Any, ...]]  # keywords, the function that makes them, its other arguments


class TowerGrids(Fusion):
    """Qwen-VL's tower, which takes all of these as keywords: transformers' own functions make them, from host grids.

    Left alone the tower reads the grids back several times, and each of its layers the boundaries.
    """

    op = "attention"

    @staticmethod
    def refuses(module: Any) -> str | None:
        missing = [name for _, name, _ in _parts(module) if not hasattr(sys.modules.get(_MODULE), name)]
        return f"this transformers has no {', '.join(missing)}" if missing else None

    @staticmethod
    def unsupported(module: Any, hidden_states: Tensor, grid_thw: Any = None, **kwargs: Any) -> str | None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "transformers' own code is traced"
        return None if torch.is_tensor(grid_thw) and grid_thw.dim() == 2 else "its grids are no tensor (images, 3)"

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Any], hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any
    ) -> Any:
        given = {name for name, value in kwargs.items() if value is not None}  # by a caller who captures graphs
        if missing := [part for part in _parts(module) if not given.issuperset(part[0])]:
            grids = grid_thw.cpu()
            made: dict[str, Tensor] = {}
            for names, function, arguments in missing:
                values = getattr(sys.modules[_MODULE], function)(grids, *arguments)
                made.update(zip(names, (values,) if len(names) == 1 else values, strict=True))
            for ends, longest in _LONGEST.items():
                if ends in made and longest not in given:
                    kwargs[longest] = int(made[ends].diff().max())
            kwargs.update({name: _upload(value, hidden_states.device) for name, value in made.items()})
        return original(module, hidden_states, grid_thw, **kwargs)

    @staticmethod
    def backend(device: torch.device) -> str:
        return "host"


def _parts(module: Any) -> list[_Part]:
    merge = module.spatial_merge_size
    parts: list[_Part] = [
        (("position_ids",), "get_vision_position_ids", (merge,)),
        (("cu_seqlens",), "get_vision_cu_seqlens", ()),
    ]
    if hasattr(module, "window_size"):
        windows = (merge, module.window_size, module.patch_size)
        parts.append((("window_index", "cu_window_seqlens"), "get_vision_window_index", windows))
    if hasattr(module, "num_grid_per_side"):
        table = (module.num_grid_per_side, module.interpolation_mode, module.interpolation_align_corners, merge)
        names = ("interp_indices", "interp_weights")
        parts.append((names, "get_vision_interpolation_indices_and_weights", table))
    return parts


def window_order(module: Any, grids: list[tuple[int, int, int]]) -> Tensor | None:
    """Return which of its merged tokens a tower has at each place of its windows, host; None: it has no windows."""
    for names, function, arguments in _parts(module):
        if "window_index" in names:
            made: Tensor = getattr(sys.modules[_MODULE], function)(torch.tensor(grids), *arguments)[0]
            return made
    return None


def _upload(value: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":  # from pageable memory the host would wait
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
