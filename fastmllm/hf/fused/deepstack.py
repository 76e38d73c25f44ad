"""DeepStack (arXiv 2406.04334): visual features added to the first layers' hidden states, at the image's places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmllm.hf.fused.kept import kept
from fastmllm.hf.fusion import Fusion


class DeepStack(Fusion):
    """`_deepstack_process` of Qwen3-VL's language model: one `index_add`, without its mask's two host reads a layer."""

    op = "insert_features"
    overrides = ("_deepstack_process",)

    @staticmethod
    def unsupported(module: Any, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> str | None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "transformers' own code is traced"
        if visual_pos_masks.dtype != torch.bool or visual_pos_masks.shape != hidden_states.shape[:-1]:
            return f"its mask is {visual_pos_masks.dtype} {tuple(visual_pos_masks.shape)}"
        return None

    @staticmethod
    def _deepstack_process(
        module: Any, original: Callable[..., Tensor], hidden_states: Tensor, visual_pos_masks: Tensor,
        visual_embeds: Tensor,
    ) -> Tensor:  # fmt: skip
        count = len(visual_embeds)
        if visual_pos_masks.device.type == "cpu" and int(visual_pos_masks.sum()) != count:
            return original(module, hidden_states, visual_pos_masks, visual_embeds)  # says what does not match
        index = kept(visual_pos_masks, "places", lambda mask: _places(mask, count)).to(hidden_states.device)
        embeds = visual_embeds.to(hidden_states.device, hidden_states.dtype)
        return hidden_states.flatten(0, 1).index_add(0, index, embeds).view_as(hidden_states)


def _places(mask: Tensor, count: int) -> Tensor:
    if mask.device.type != "cpu":
        torch._assert_async(mask.sum() == count, "DeepStack features and visual tokens do not match")
    return mask.reshape(-1).nonzero_static(size=count)[:, 0]
