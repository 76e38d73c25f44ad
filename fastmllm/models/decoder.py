"""One decoder layer of the Llama, Mistral, Qwen2 and Qwen3 families, on packed sequences, and the shape of them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.compression.compressor import Probe
from fastmllm.kernels._watch import report
from fastmllm.kernels.attention import attention
from fastmllm.kernels.cross_attention import cross_attention
from fastmllm.kernels.vision_rope import vision_rope
from fastmllm.models.kv_cache import CacheSlots, KVCache
from fastmllm.models.rope import RopeScaling
from fastmllm.modules.layer_norm import LayerNorm
from fastmllm.modules.rms_norm import RMSNorm

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig:
    """Say the shape of a decoder.

    Args:
        vocab_size: tokens V.
        width: residual stream D.
        depth: layers.
        num_heads: query heads H.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of one head; even.
        mlp_width: hidden width of the gated MLP.
        rope_theta: base of the rotary frequencies.
        norm_eps: inside the root of RMSNorm.
        max_positions: longest sequence that the model was trained for.
        tie_embeddings: the head is the embedding table.
        qkv_bias: q, k and v projections have a bias (Qwen2; Llama's `attention_bias`).
        output_bias: the o projection has one too (Llama's `attention_bias`).
        qk_norm: queries and keys are normed over each head before they are turned (Qwen3).
        activation: of the MLP, "silu", "gelu_tanh" or "relu".
        gated_mlp: down(activation(gate(x)) * up(x)), without biases; else down(activation(up(x))), with (OPT).
        layer_norm: LayerNorm instead of RMSNorm (OPT).
        learned_positions: a table of positions is added to the embeddings instead of turning q and k (OPT).
        rope_scaling: how the rotary frequencies are stretched, or None.
        mrope_section: frequencies that follow time, row and column; positions are (3, T) then (Qwen2-VL), or None.
        mrope_interleaved: the three take turns (Qwen3-VL).
        sliding_window: tokens that a row sees, itself included (Mistral), or None.
        sliding_layers: layers with that window; None for all.
        extra_embeddings: rows of the embedding table behind the vocabulary, which the head lacks (Llama-3.2-Vision).
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    max_positions: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    gated_mlp: bool = True
    layer_norm: bool = False
    learned_positions: bool = False
    rope_scaling: RopeScaling | None = None
    mrope_section: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    extra_embeddings: int = 0

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "width", "depth", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "max_positions")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"fastmllm::LanguageConfig: {name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"fastmllm::LanguageConfig: num_heads {self.num_heads} is no multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"fastmllm::LanguageConfig: rotary positions need an even head_dim, got {self.head_dim}")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError("fastmllm::LanguageConfig: rope_theta and norm_eps must be positive")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"fastmllm::LanguageConfig: activation {self.activation!r} is not in {list(_ACTIVATIONS)}")
        section = self.mrope_section
        if section is not None and (len(section) != 3 or min(section) < 0 or 2 * sum(section) != self.head_dim):
            raise ValueError(
                f"fastmllm::LanguageConfig: mrope_section {section} must be three numbers with the sum head_dim / 2, "
                f"head_dim is {self.head_dim}"
            )
        if self.extra_embeddings < 0 or (self.tie_embeddings and self.extra_embeddings):
            raise ValueError(
                f"fastmllm::LanguageConfig: {self.extra_embeddings} extra_embeddings must not be negative, and have no "
                "place in a head that is the table (tie_embeddings)"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"fastmllm::LanguageConfig: sliding_window must be positive, got {self.sliding_window}")

    def norm(self) -> LayerNorm | RMSNorm:
        """Make a norm."""
        return (LayerNorm if self.layer_norm else RMSNorm)(self.width, self.norm_eps)

    def slides(self, layer: int) -> bool:
        """Tell whether a layer has the sliding window."""
        return self.sliding_window is not None and (self.sliding_layers is None or layer in self.sliding_layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What every layer of one forward shares."""

    cos: Tensor | None  # (T, Dh/2), fp32 or wider; None where positions are learned
    sin: Tensor | None
    cu_seqlens: Tensor  # (S+1,) int32
    max_seqlen: int
    window: tuple[Tensor, Tensor] | None  # (T,) int32 rows that a row sees through the sliding window, if it is full
    cache: KVCache | None
    slots: CacheSlots | None
    key_bias: Tensor | None = None  # (T,) fp32 added to the scores of each key
    probed: frozenset[int] = frozenset()  # layers whose attention is wanted
    seen: dict[int, Probe] = field(default_factory=dict)  # layer -> its attention


class Attention(nn.Module):
    """Causal self-attention with grouped key heads, rotary positions, and the variants of the configuration."""

    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.slides = layer, config.slides(layer)
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, kv_heads, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, kv_heads, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.width, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        """Attend within each packed sequence: (T, D) -> (T, D)."""
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, Dh)
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, Hkv, Dh)
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if context.cos is not None and context.sin is not None:
            # joined, one operator turns both: less time than two calls even with the copy
            query, key, _ = vision_rope(
                torch.cat((query, key), dim=1), context.cos, context.sin, self.num_heads, self.num_kv_heads
            )
        if context.cache is None or context.slots is None:
            return self.o_proj(self._packed(query, key, value, context).flatten(1))
        keys, values = context.cache.write(self.layer, key, value, context.slots)
        mask = context.slots.window_mask if self.slides else context.slots.mask
        if mask is None:  # nothing was cached before: the packed tokens see each other only
            return self.o_proj(self._packed(query, key, value, context).flatten(1))
        return self.o_proj(_attend_cached(query, keys, values, context.slots, mask).flatten(1))

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, context: Pass) -> Tensor:
        if self.slides and context.window is not None:
            if context.key_bias is not None or self.layer in context.probed:
                raise ValueError(
                    f"fastmllm::LanguageModel: layer {self.layer} attends through a full sliding window: no visual "
                    "tokens are judged by it, and none weigh more than one"
                )
            return cross_attention(query, key, value, *context.window, max_seqlen_q=1)
        out, lse = attention(
            query,
            key,
            value,
            context.cu_seqlens,
            max_seqlen_q=context.max_seqlen,
            causal=True,
            softmax_scale=self.head_dim**-0.5,
            key_bias=context.key_bias,
            return_lse=True,
        )
        if self.layer in context.probed:
            context.seen[self.layer] = Probe(
                q=query.detach(), k=key.detach(), lse=lse, cu_seqlens=context.cu_seqlens,
                max_seqlen=context.max_seqlen, causal=True, key_bias=context.key_bias,
            )  # fmt: skip
        return out


def _attend_cached(query: Tensor, keys: Tensor, values: Tensor, slots: CacheSlots, mask: Tensor) -> Tensor:
    """Attend from packed new tokens (T, H, Dh) to the padded cache (B, Hkv, L, Dh)."""
    batch, width = len(slots.counts), max(slots.counts)
    if len(query) == batch * width:  # the usual step: the same number of new tokens everywhere
        padded = query.view(batch, width, *query.shape[1:])
    else:
        padded = query.new_zeros(batch, width, *query.shape[1:])
        padded[slots.rows, slots.offsets] = query
    report("cached_attention", query, mask, slots.rows, slots.offsets)
    out = F.scaled_dot_product_attention(
        padded.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)  # (B, n, H, Dh)
    return out[slots.rows, slots.offsets]


class MLP(nn.Module):
    """Gated MLP: down(activation(gate(x)) * up(x)) (arXiv 2002.05202); without gate, down(activation(up(x)))."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        bias = not config.gated_mlp
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False) if config.gated_mlp else None
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=bias)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=bias)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: (T, D) -> (T, D)."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = config.norm()
        self.post_attention_layernorm = config.norm()

    def forward(self, x: Tensor, context: Pass, inner: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Apply the layer: (T, D) -> (T, D), with `inner` between attention and MLP."""
        x = x + self.self_attn(self.input_layernorm(x), context)
        if inner is not None:
            x = inner(x)
        return x + self.mlp(self.post_attention_layernorm(x))
