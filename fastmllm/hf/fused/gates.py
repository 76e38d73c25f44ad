"""Tanh-gated cross-attention layers: gate and residual in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.hf.fusion import Fusion
from fastmllm.kernels.gated_residual import gated_residual


class GatedLayer(Fusion):
    """Idefics' gated layer: x + tanh(alpha) * branch for both of its branches."""

    op = "gated_residual"

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        return _on_cpu(device)

    @staticmethod
    def refuses(module: Any) -> str | None:
        if type(module.act_cross_attn) is not nn.Tanh or type(module.act_dense) is not nn.Tanh:
            return f"its gates are {type(module.act_cross_attn).__name__}, not Tanh"
        return None

    @staticmethod
    def unsupported(
        module: Any, hidden_states: Tensor, attention_mask: Any = None, image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None, cross_attention_gate: Tensor | None = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> str | None:  # fmt: skip
        if image_hidden_states is None or cross_attention_gate is None or past_key_values is not None:
            return "transformers says what is wrong with its arguments"
        if module.training and module.config > 0:  # the name that Idefics gives to its dropout
            return "dropout in training"
        return _one_dtype(hidden_states, module.alpha_cross_attn)

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Tensor], hidden_states: Tensor, attention_mask: Any = None,
        image_hidden_states: Tensor | None = None, image_attention_mask: Tensor | None = None,
        cross_attention_gate: Any = None, past_key_values: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        branch, _ = module.cross_attn(
            hidden_states=module.input_layernorm(hidden_states), key_value_states=image_hidden_states,
            attention_mask=image_attention_mask, **kwargs,
        )  # fmt: skip
        branch = branch.masked_fill((cross_attention_gate == 0)[:, :, None], 0.0)  # rows that see no image
        hidden_states = gated_residual(hidden_states, branch, module.alpha_cross_attn.flatten())
        branch = module.mlp(module.post_attention_layernorm(hidden_states))
        return gated_residual(hidden_states, branch, module.alpha_dense.flatten())


class MllamaGatedLayer(Fusion):
    """Llama-3.2-Vision's cross-attention layer: the same with one number a gate, and rows without images masked."""

    op = "gated_residual"

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        return _on_cpu(device)

    @staticmethod
    def unsupported(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> str | None:
        return "its arguments come by place" if args else _one_dtype(hidden_states, module.cross_attn_attn_gate)

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Tensor], hidden_states: Tensor, *,
        cross_attention_states: Tensor | None, cross_attention_mask: Tensor | None,
        full_text_row_masked_out_mask: Any, past_key_values: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        for name in ("attention_mask", "position_ids", "use_cache", "position_embeddings"):
            kwargs.pop(name, None)  # the layer takes them, its attention does not
        branch, _ = module.cross_attn(
            hidden_states=module.input_layernorm(hidden_states), attention_mask=cross_attention_mask,
            cross_attention_states=cross_attention_states, past_key_values=past_key_values, **kwargs,
        )  # fmt: skip
        hidden_states = gated_residual(hidden_states, branch, module.cross_attn_attn_gate)
        branch = module.mlp(module.post_attention_layernorm(hidden_states))
        if full_text_row_masked_out_mask is not None:
            branch = full_text_row_masked_out_mask[:, 0] * branch
        return gated_residual(hidden_states, branch, module.cross_attn_mlp_gate)


def _on_cpu(device: torch.device) -> str | None:
    # on a GPU two launches in place of six, and no gated branch is written and read again
    return "its gates are too little of a layer to gain on a CPU" if device.type == "cpu" else None


def _one_dtype(hidden_states: Tensor, gate: Tensor) -> str | None:
    if hidden_states.dtype != gate.dtype or torch.is_autocast_enabled(hidden_states.device.type):
        return f"branches may be of another dtype than {hidden_states.dtype}"
    return None
