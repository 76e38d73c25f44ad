"""Attention of packed vision towers: one call over all windows or images, positions turned on the packed QKV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.hf.fused.kept import kept
from fastmllm.hf.fusion import Fusion
from fastmllm.kernels import _native
from fastmllm.kernels.attention import MAX_HEAD_DIM, attention
from fastmllm.kernels.vision_rope import vision_rope


class TowerAttention(Fusion):
    """Qwen-VL's vision attention: `qkv`, `proj`, tables of a whole head's width whose halves are equal.

    transformers calls SDPA once a window or image, after it has read their lengths back, in every layer.
    """

    op = "attention"

    @staticmethod
    def refuses(module: Any) -> str | None:
        if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("qkv", "proj")):
            return "it has no qkv and proj"
        if not all(hasattr(module, name) for name in ("num_heads", "head_dim", "scaling", "config")):
            return "it does not say its heads or its scale"
        if module.head_dim % 2 or module.head_dim > MAX_HEAD_DIM or getattr(module, "num_key_value_groups", 1) != 1:
            return f"its heads are {module.head_dim} wide, in groups of {getattr(module, 'num_key_value_groups', 1)}"
        return "it is causal" if getattr(module, "is_causal", False) else None

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        # a GPU: one launch turns q and k where transformers takes a dozen, and one call attends where it takes one a
        # window, after a read; a CPU (Qwen2.5-VL, 448 and 896 pixels): 1.01 to 1.09 times faster in fp32, where
        # matrix products are nearly all, 1.02 to 1.33 times in bf16
        if device.type == "cpu" and _native.EXTENSION_MISSING:
            return "the C++ operators are not built"
        return None

    @staticmethod
    def unsupported(
        module: Any, hidden_states: Tensor, cu_seqlens: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None, max_seqlen: int | None = None, **kwargs: Any,
    ) -> str | None:  # fmt: skip
        kind = module.config._attn_implementation
        if kind != "sdpa" and not str(kind).startswith("flash_attention"):
            return f"its attention is {kind}"
        if kwargs.get("output_attentions") or kwargs.get("attention_mask") is not None:
            return "weights are asked for, or a mask is given"
        if module.training and getattr(module, "attention_dropout", 0.0):
            return "dropout"
        if cu_seqlens is None or position_embeddings is None or hidden_states.dim() != 2:
            return "its rows are not packed with their positions"
        shape = (hidden_states.shape[0], module.head_dim)
        if any(t.shape != shape or t.device != hidden_states.device for t in position_embeddings):
            return "its tables are not those of its rows"
        return None if cu_seqlens.device == hidden_states.device else "its boundaries are on another device"

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Tensor], hidden_states: Tensor, cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor], max_seqlen: int | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        rows, heads = hidden_states.shape[0], module.num_heads
        if torch.compiler.is_compiling():
            cos, sin = map(half_table, position_embeddings)
            max_seqlen = rows if max_seqlen is None else max_seqlen  # a bound: reading the maximum breaks the graph
        else:
            cos, sin = (kept(table, "half", half_table) for table in position_embeddings)
        q, k, v = vision_rope(module.qkv(hidden_states).view(rows, 3 * heads, module.head_dim), cos, sin, heads)
        out = attention(q, k, v, cu_seqlens.int(), max_seqlen_q=max_seqlen, softmax_scale=module.scaling)
        return module.proj(out.view(rows, -1))


def half_table(table: Tensor) -> Tensor:
    """Return the first half of a table, (T, R/2) contiguous."""
    return table[:, : table.shape[1] // 2].contiguous()
