"""Learned queries that read image features: the Perceiver resampler (arXiv 2103.03206) and Q-Former."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.hf.fusion import Fusion, plain
from fastmllm.kernels.attention import MAX_HEAD_DIM, attention
from fastmllm.kernels.layer_norm import layer_norm


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Let the L queries of each sample see its K keys: (B, L, H, D), (B, K, Hkv, D) -> (B, L, H D)."""
    (samples, length, *_), keys = q.shape, k.shape[1]
    bounds = [
        torch.arange(0, (samples + 1) * n, n, dtype=torch.int32, device=q.device) if n else None for n in (length, keys)
    ]
    out = attention(*(t.flatten(0, 1) for t in (q, k, v)), *bounds, length, keys, softmax_scale=scale)  # type: ignore
    return out.view(samples, length, -1)


class PerceiverAttention(Fusion):
    """Idefics' resampler: its latents see the image and themselves, softmax and products written out in einsums.

    Image and latents are put together once for both projections, and no scores are stored.
    """

    op = "attention"

    @staticmethod
    def refuses(module: Any) -> str | None:
        return _too_wide(module.head_dim)

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        # on a GPU one kernel in place of seven launches and stored scores; fp32 on a CPU 1.0 to 1.04 times as fast
        narrow = device.type == "cpu" and dtype != torch.float32
        return f"torch's attention in {dtype} loses to products on a CPU" if narrow else None

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], context: Tensor, latents: Tensor) -> Tensor:
        latents = module.latents_layer_norm(latents)
        both = torch.cat([module.context_layer_norm(context), latents], dim=-2)
        q, k, v = module.q_proj(latents), module.k_proj(both), module.v_proj(both)
        q, k, v = (t.unflatten(-1, (module.n_heads, module.head_dim)) for t in (q, k, v))
        if module.qk_layer_norms:
            q, k = module.q_layer_norm(q).to(v.dtype), module.k_layer_norm(k).to(v.dtype)  # autocast's are fp32
        return module.output_proj(_attend(q, k, v, module.qk_scale))


class QFormerCrossAttention(Fusion):
    """The attention of BLIP-2's and InstructBLIP's Q-Former, where the queries see an image."""

    op = "attention"

    @staticmethod
    def refuses(module: Any) -> str | None:
        return _too_wide(module.attention_head_size)

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        return "transformers calls one attention kernel too"

    @staticmethod
    def unsupported(
        module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None, **kwargs: Any,
    ) -> str | None:  # fmt: skip
        if encoder_hidden_states is None:
            return None  # a text's own attention, which runs transformers' code as a matter of course
        if encoder_attention_mask is not None:
            return "a mask over the image"
        if module.config._attn_implementation != "sdpa" or kwargs.get("output_attentions"):
            return f"{module.config._attn_implementation} attention was asked for"
        if encoder_hidden_states.shape[0] != hidden_states.shape[0]:
            return "one image for several samples"
        return "dropout in training" if module.training and module.attention_dropout > 0 else None

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Any], hidden_states: Tensor, attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if encoder_hidden_states is None:
            return original(module, hidden_states, attention_mask, **kwargs)
        image = encoder_hidden_states
        q, k, v = module.query(hidden_states), module.key(image), module.value(image)
        q, k, v = (t.unflatten(-1, (-1, module.attention_head_size)) for t in (q, k, v))
        return _attend(q, k, v, module.scaling), None


class AddNorm(Fusion):
    """The end of Q-Former's blocks, post-norm as in BERT: LayerNorm(dense(x) + input), sum and norm in one."""

    op = "layer_norm"

    @staticmethod
    def refuses(module: Any) -> str | None:
        norm = module.LayerNorm
        if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1 or norm.weight is None:
            return f"its norm is {norm}"
        return plain(norm)

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        return "torch's own is as fast on a CPU" if device.type == "cpu" else None

    @staticmethod
    def unsupported(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> str | None:
        if input_tensor.dtype != module.LayerNorm.weight.dtype or torch.is_autocast_enabled(input_tensor.device.type):
            return f"the sum of {input_tensor.dtype} may be of another dtype"
        return plain(module.LayerNorm)

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        norm = module.LayerNorm
        added = module.dropout(module.dense(hidden_states))
        return layer_norm(added, norm.weight, norm.bias, input_tensor, norm.eps)[0]


def _too_wide(head_dim: int) -> str | None:
    return f"its heads are {head_dim} wide, more than {MAX_HEAD_DIM}" if head_dim > MAX_HEAD_DIM else None
