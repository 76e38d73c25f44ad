"""Idefics2's resampler: latents that see the pixels of an image and themselves, padding put out of the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.hf.fused.tile_attention import READ, attend, unreadable
from fastmllm.hf.fusion import Fusion
from fastmllm.kernels.cross_attention import MAX_HEAD_DIM


class PaddingFirst(Fusion):
    """The resampler: patches of padding stand in front of an image's own, and where all images have some, are left out.

    It has no positions, so the order of its context is free; then each image's keys are neighbours.
    """

    op = "cross_attention"

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        return _slower(device)

    @staticmethod
    def unsupported(module: Any, context: Tensor, attention_mask: Tensor, **kwargs: Any) -> str | None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "transformers' own code is traced"
        if attention_mask.shape != context.shape[:2] or attention_mask.device != context.device or not context.numel():
            return f"its mask is {tuple(attention_mask.shape)}, its images {tuple(context.shape)}"
        return None

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Any], context: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Any:
        padding = attention_mask == 0
        order = padding.to(torch.uint8).argsort(descending=True, stable=True)
        if context.device.type == "cpu":  # elsewhere the host would wait for their number
            counts = padding.sum(1).tolist()
            if not any(counts):
                return original(module, context, attention_mask, **kwargs)
            order = order[:, min(counts) :]
        context = context.gather(1, order[..., None].expand(-1, -1, context.shape[2]))
        return original(module, context, attention_mask.gather(1, order), **kwargs)


class ResamplerAttention(Fusion):
    """Its layers' attention over context and latents, each key/value head read where it lies."""

    op = "cross_attention"

    @staticmethod
    def refuses(module: Any) -> str | None:
        if not all(isinstance(getattr(module, f"{name}_proj", None), nn.Module) for name in "qkvo"):
            return "it has no q_proj, k_proj, v_proj and o_proj"
        return f"its heads are {module.head_dim} wide" if module.head_dim > MAX_HEAD_DIM else None

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        return _slower(device)

    @staticmethod
    def unsupported(
        module: Any, latents: Tensor, context: Tensor, attention_mask: Tensor | None = None, position_ids: Any = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> str | None:  # fmt: skip
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "transformers' own code is traced"
        if module.config._attn_implementation != "sdpa" or kwargs.get("output_attentions"):
            return f"{module.config._attn_implementation} attention was asked for"
        if any(kwargs.get(name) is not None for name in READ) or past_key_values is not None:
            return "it is called with options of SDPA, or a cache"
        if getattr(module, "past_key_values", None) is not None or module.is_causal:
            return "it is causal, or has a cache"
        if module.training and module.attention_dropout:
            return "dropout in training"
        keys = context.shape[1] + latents.shape[1]
        return None if attention_mask is None else unreadable(attention_mask, latents, keys)

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Any], latents: Tensor, context: Tensor,
        attention_mask: Tensor | None = None, position_ids: Any = None, past_key_values: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        both = torch.cat([context, latents], dim=1)
        q, k, v = module.q_proj(latents), module.k_proj(both), module.v_proj(both)
        q, k, v = (t.unflatten(-1, (-1, module.head_dim)) for t in (q, k, v))
        out = attend(q, k.transpose(1, 2), v.transpose(1, 2), attention_mask, module.scaling)
        return module.o_proj(out.flatten(2)), None


def _slower(device: torch.device) -> str | None:
    # two images of 1225 patches, 64 latents, on a CPU: 0.91 to 0.94 times as fast in bf16, 0.96 to 1.03 in fp32; on a
    # GPU moving the patches once takes as many bytes as three layers' repeated heads
    return "putting padding in order costs " + (
        "a CPU more than its mask" if device.type == "cpu" else "its mask's bytes"
    )
