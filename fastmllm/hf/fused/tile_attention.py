"""Llama-3.2-Vision's cross-attention: each word's tiles as a span of keys, key/value heads read where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.hf.fused.spans import spans
from fastmllm.hf.fusion import Fusion, outside_autocast
from fastmllm.kernels.cross_attention import MAX_HEAD_DIM, cross_attention

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
READ = ("is_causal", "position_bias", "cache", "softcap", "dropout", "scaling")  # by transformers' SDPA


class TileAttention(Fusion):
    """`cross_attn`: transformers' SDPA reads a mask of all tiles, for which it repeats keys and values to all heads.

    Without a mask every word sees every tile, as in eager attention; transformers' SDPA takes that for causal.
    """

    op = "cross_attention"

    @staticmethod
    def refuses(module: Any) -> str | None:
        if not all(isinstance(getattr(module, name, None), nn.Module) for name in PARTS):
            return f"it has other parts than {', '.join(PARTS)}"
        return f"its heads are {module.head_dim} wide" if module.head_dim > MAX_HEAD_DIM else None

    # `slower` nowhere: a CPU (11B's widths, 128 to 256 words, 1 to 4 of 4 tiles) takes 1.05 to 1.5 times less, training
    # 1.3, a decoded word 1.1 to 1.5; a GPU reads neither the mask in every layer nor four copies of keys and values

    @staticmethod
    def unsupported(
        module: Any, hidden_states: Tensor, cross_attention_states: Tensor | None = None, past_key_values: Any = None,
        attention_mask: Tensor | None = None, use_cache: Any = None, **kwargs: Any,
    ) -> str | None:  # fmt: skip
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "transformers' own code is traced"
        if module.config._attn_implementation != "sdpa" or kwargs.get("output_attentions"):
            return f"{module.config._attn_implementation} attention was asked for"
        if any(kwargs.get(name) is not None for name in READ):
            return "it is called with options of SDPA"
        if module.training and module.dropout:
            return "dropout in training"
        if cross_attention_states is None and _cached(module, past_key_values) is None:
            return "there is no image"
        return None if attention_mask is None else unreadable(attention_mask, hidden_states, attention_mask.shape[-1])

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Any], hidden_states: Tensor, cross_attention_states: Tensor | None = None,
        past_key_values: Any = None, attention_mask: Tensor | None = None, use_cache: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        samples, length, _ = hidden_states.shape
        q = module.q_norm(module.q_proj(hidden_states).view(samples, length, -1, module.head_dim))
        if cross_attention_states is None:
            layer = _cached(module, past_key_values)
            k, v = layer.keys, layer.values
        else:
            k, v = module.k_proj(cross_attention_states), module.v_proj(cross_attention_states)
            k, v = (t.view(samples, -1, module.num_key_value_heads, module.head_dim) for t in (k, v))
            k, v = module.k_norm(k).transpose(1, 2), v.transpose(1, 2)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, module.layer_idx)
        if attention_mask is not None and attention_mask.shape[-1] != k.shape[2]:
            raise ValueError(f"a mask of {attention_mask.shape[-1]} keys is given for images of {k.shape[2]}")
        return module.o_proj(attend(q, k, v, attention_mask, module.scaling).flatten(2)), None


def _cached(module: Any, past_key_values: Any) -> Any:
    """Return the layer of a cache that holds keys and values of images, or None."""
    layers = () if past_key_values is None else past_key_values.layers
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    return None if layer is None or layer.keys is None or not layer.keys.numel() else layer


def unreadable(mask: Tensor, hidden_states: Tensor, keys: int) -> str | None:
    """Say why a mask over some keys is no span of them a row, or None."""
    samples, length, _ = hidden_states.shape
    if mask.shape != (samples, 1, length, keys) or not keys:
        return f"its mask is {tuple(mask.shape)}"
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a captured graph would be replayed with another mask"
    seen = spans(mask, length > 1)  # one word's keys, which come from a cache, are not worth putting in order
    if seen is None:
        return "a word's keys are not neighbours"
    if length == 1 and seen.whole and mask.device.type == "cpu":
        return "a word sees every key"  # of which a CPU gains nothing: transformers calls the same kernel
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Let rows (B, T, H, D) see keys and values (B, Hkv, N, D) through a mask that is readable: (B, T, H, D)."""
    (samples, length), keys = q.shape[:2], k.shape[2]
    seen = None if mask is None else spans(mask, length > 1)
    if seen is not None and seen.order is not None:
        index = seen.order[:, None, :, None]
        k, v = (t.gather(2, index.expand_as(t)) for t in (k, v))
    k, v, step = _packed(k, v)
    first = torch.arange(0, samples * step, step, dtype=torch.int32, device=q.device)[:, None]
    if seen is None:
        start, stop = (t.expand(samples, length) for t in (first, first + keys))
    else:
        start, stop = first + seen.start, first + seen.stop
    out = outside_autocast(
        cross_attention, q.flatten(0, 1), k, v, start.flatten(), stop.flatten(), softmax_scale=scale,
        max_seqlen_q=length, max_seqlen_k=keys,
    )  # fmt: skip
    return out.view(samples, length, *out.shape[1:])


def _packed(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return (B, Hkv, N, D) as rows of keys (M, Hkv, D), and by how many rows a sample begins behind another."""
    (samples, heads, keys, width), (apart, of_head, of_key, unit) = k.shape, k.stride()
    learns = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    if samples > 1 and not learns and k.stride() == v.stride() and unit == 1 and of_key and apart % of_key == 0:
        # a cache holds heads outside of keys: the rows between two samples' are those of other heads
        step = apart // of_key
        shape = ((samples - 1) * step + keys, heads, width)
        k, v = (t.as_strided(shape, (of_key, of_head, 1), t.storage_offset()) for t in (k, v))
        return k, v, step
    return k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1), keys
