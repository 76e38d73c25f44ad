"""Decoder-only language models of the Llama and Qwen2 families, on packed sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmllm.kernels.attention import attention
from fastmllm.kernels.rms_norm import rms_norm
from fastmllm.models.kv_cache import CacheSlots, KVCache
from fastmllm.modules.lm_head import LMHead


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """What every layer of one forward shares."""

    cos: Tensor  # (T, 1, Dh/2), fp32 or wider
    sin: Tensor
    cu_seqlens: Tensor  # (S+1,) int32
    max_seqlen: int
    cache: KVCache | None
    slots: CacheSlots | None


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Compute the cosine and sine of every position, in fp32.

    Args:
        position_ids: (T,) integers.
        head_dim: Dh.
        theta: base of the frequencies.

    Returns:
        Two (T, 1, Dh/2) tables; the halves of a head share them (RoFormer, arXiv 2104.09864, as Llama lays it out).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[:, None].float() * (1.0 / theta**exponents)  # (T, Dh/2)
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head by its position; fp32 inside, rounded once.

    Args:
        x: (T, H, Dh).
        cos: (T, 1, Dh/2).
        sin: (T, 1, Dh/2).

    Returns:
        (T, H, Dh), dtype of `x`.
    """
    first, second = x.chunk(2, dim=-1)  # type promotion lifts bf16 halves to the tables' fp32
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """Scale to unit mean square over the last axis; statistics in fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (T, D)."""
        y = rms_norm(x, self.weight, eps=self.eps)
        assert isinstance(y, Tensor)
        return y


class Attention(nn.Module):
    """Causal self-attention with grouped key heads and rotary positions."""

    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, kv_heads, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, kv_heads, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.width, bias=config.output_bias)

    def forward(self, x: Tensor, context: _Pass) -> Tensor:
        """Attend within each packed sequence: (T, D) -> (T, D)."""
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, Dh)
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, Hkv, Dh)
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        query = rotate(query, context.cos, context.sin)
        key = rotate(key, context.cos, context.sin)
        if context.cache is None or context.slots is None:
            return self.o_proj(self._packed(query, key, value, context).flatten(1))
        keys, values = context.cache.write(self.layer, key, value, context.slots)
        if context.slots.mask is None:  # nothing was cached before: the packed tokens see each other only
            return self.o_proj(self._packed(query, key, value, context).flatten(1))
        return self.o_proj(_attend_cached(query, keys, values, context.slots).flatten(1))

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, context: _Pass) -> Tensor:
        return attention(
            query,
            key,
            value,
            context.cu_seqlens,
            max_seqlen_q=context.max_seqlen,
            causal=True,
            softmax_scale=self.head_dim**-0.5,
        )


def _attend_cached(query: Tensor, keys: Tensor, values: Tensor, slots: CacheSlots) -> Tensor:
    """Attend from packed new tokens (T, H, Dh) to the padded cache (B, Hkv, L, Dh)."""
    batch, width = len(slots.counts), max(slots.counts)
    if len(query) == batch * width:  # the usual step: the same number of new tokens everywhere
        padded = query.view(batch, width, *query.shape[1:])
    else:
        padded = query.new_zeros(batch, width, *query.shape[1:])
        padded[slots.rows, slots.offsets] = query
    out = F.scaled_dot_product_attention(
        padded.transpose(1, 2), keys, values, attn_mask=slots.mask, enable_gqa=True
    ).transpose(1, 2)  # (B, n, H, Dh)
    return out[slots.rows, slots.offsets]


class MLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: (T, D) -> (T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, context: _Pass) -> Tensor:
        """Apply the layer: (T, D) -> (T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Decoder(nn.Module):
    """Embedding, layers and final norm: the part that Hugging Face names `model`."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)


class LanguageModel(nn.Module):
    """Decode packed sequences; parameter names and values of Hugging Face's LlamaForCausalLM and Qwen2ForCausalLM.

    Args:
        config: the shape.

    Attributes:
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.model = _Decoder(config)
        self.lm_head = LMHead(config.width, config.vocab_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding table again, where the config says so (after an assigning load)."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def head_weight(self) -> Tensor:
        """The head (V, D)."""
        return self.lm_head.weight

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """Make an empty cache in this model's dtype and device.

        Args:
            batch: sequences.
            max_length: tokens a sequence, prompt and new ones together.

        Returns:
            The cache.
        """
        weight = self.head_weight
        return KVCache(
            depth=self.config.depth,
            batch=batch,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            max_length=max_length,
            dtype=weight.dtype,
            device=weight.device,
        )

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up token embeddings.

        Args:
            input_ids: (T,) integers below V.

        Returns:
            (T, D).
        """
        return self.model.embed_tokens(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states on the vocabulary; choose the rows first, V is large.

        Args:
            hidden: (T, D), from `forward`.

        Returns:
            (T, V), dtype of `hidden`.
        """
        return self.lm_head(hidden)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Decode packed sequences.

        Args:
            inputs_embeds: (T, D), all sequences one after another.
            position_ids: (T,) integers; restart in each sequence, go on from the cached ones with a cache.
            cu_seqlens: (S+1,) int32 boundaries.
            max_seqlen: longest sequence of this call, host.
            cache: earlier tokens of the same S sequences; the new ones are added. Only without autograd.

        Returns:
            (T, D) hidden states after the final norm.

        Raises:
            ValueError: shapes that do not fit together, or a cache under autograd.
        """
        self._check(inputs_embeds, position_ids, cu_seqlens, cache)
        cos, sin = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        slots = None
        if cache is not None:
            # one token a sequence needs no look at the device; otherwise the lengths are read back once a call
            sequences = len(cu_seqlens) - 1
            counts = [1] * sequences if max_seqlen == 1 else cu_seqlens.diff().tolist()
            slots = cache.reserve(counts)
        context = _Pass(cos=cos, sin=sin, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, cache=cache, slots=slots)
        x = inputs_embeds
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.model.layers:
            x = checkpoint(layer, x, context, use_reentrant=False) if recompute else layer(x, context)
        if cache is not None and slots is not None:
            cache.advance(slots)
        return self.model.norm(x)

    def _check(self, inputs_embeds: Tensor, position_ids: Tensor, cu_seqlens: Tensor, cache: KVCache | None) -> None:
        if inputs_embeds.dim() != 2 or inputs_embeds.shape[1] != self.config.width:
            raise ValueError(
                f"fastmllm::LanguageModel: inputs_embeds must be packed (T, {self.config.width}), "
                f"got {tuple(inputs_embeds.shape)}"
            )
        if position_ids.shape != inputs_embeds.shape[:1]:
            raise ValueError(
                f"fastmllm::LanguageModel: position_ids {tuple(position_ids.shape)} must name each of the "
                f"{len(inputs_embeds)} packed tokens"
            )
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"fastmllm::LanguageModel: cu_seqlens must be (S+1,), got {tuple(cu_seqlens.shape)}")
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("fastmllm::LanguageModel: a cache is for inference; call under torch.no_grad()")
