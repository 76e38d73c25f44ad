"""Q-Former: learned queries that read an image, alone or together with text (BLIP-2, arXiv 2301.12597).

Shapes: P pairs (or images), Q queries each, T packed text rows, N media tokens of I images, D width. Queries are packed
(P * Q, D). Queries and text share the self-attention and part again for the feed-forward; only queries see the image.
The three masks of BLIP-2's first stage are three methods over packed segments, no mask is built:
unimodal (ITC) `encode_images` and `encode_text`, bidirectional (ITM, InstructBLIP) `forward`, causal multimodal (ITG)
`encode_text` with the queries' keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from fastmllm.kernels.attention import attention
from fastmllm.kernels.cross_attention import cross_attention
from fastmllm.modules.gelu_mlp import ACTIVATIONS, GeluMLP
from fastmllm.modules.layer_norm import LayerNorm


@dataclass(frozen=True, kw_only=True, slots=True)
class QFormerConfig:
    """Say the shape of a Q-Former.

    Args:
        width: D.
        depth: layers.
        num_heads: of self- and cross-attention; divides the width.
        mlp_width: hidden width of the feed-forwards.
        media_width: of the image tokens.
        num_queries: Q.
        cross_every: layers 0, cross_every, 2 * cross_every ... look at the image.
        norm_eps: of every LayerNorm.
        activation: of the feed-forwards, "gelu", "gelu_tanh" or "quick_gelu".
        vocab_size: tokens of the text; 0 for queries only (BLIP-2's second stage).
        max_positions: longest text.
    """

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    media_width: int = 1408
    num_queries: int = 32
    cross_every: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    vocab_size: int = 0
    max_positions: int = 512

    def __post_init__(self) -> None:
        sizes = ("width", "depth", "num_heads", "mlp_width", "media_width", "num_queries", "cross_every")
        for name in (*sizes, "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"QFormerConfig: {name} must be positive, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"QFormerConfig: num_heads {self.num_heads} does not divide width {self.width}")
        if self.vocab_size < 0 or self.norm_eps <= 0 or self.activation not in ACTIVATIONS:
            raise ValueError(
                f"QFormerConfig: vocab_size {self.vocab_size} must not be negative, norm_eps {self.norm_eps} must be "
                f"positive, activation {self.activation!r} one of {sorted(ACTIVATIONS)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokens:
    """Packed image tokens, and which of them each set of queries sees.

    Args:
        tokens: (N, media_width) of all images.
        start: (P,) int32, the first token that the queries of each pair see; pairs may see the same image.
        stop: (P,) int32, the token behind the last one.
        max_tokens: of the longest range, host.
    """

    tokens: Tensor
    start: Tensor
    stop: Tensor
    max_tokens: int

    @classmethod
    def of_images(cls, tokens: Tensor, cu_seqlens: Tensor, max_tokens: int) -> ImageTokens:
        """One pair an image, with boundaries `cu_seqlens` (I + 1,) int32."""
        return cls(tokens=tokens, start=cu_seqlens[:-1], stop=cu_seqlens[1:], max_tokens=max_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedText:
    """Packed token ids.

    Args:
        ids: (T,) integers; rows behind the last segment are padding.
        cu_seqlens: (P + 1,) int32 boundaries.
        max_seqlen: longest segment, host.
    """

    ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


class _SelfAttention(nn.Module):
    """The projections of a post-LN attention block; who attends to whom is the caller's."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.width // config.num_heads)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = LayerNorm(config.width, config.norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (T, H, Dh), and keys and values (T, 2, H, Dh)."""
        qkv = self.qkv(x).view(-1, 3, *self.heads)
        return qkv[:, 0], qkv[:, 1:]

    def finish(self, attended: Tensor, x: Tensor) -> Tensor:
        """Project (T, H, Dh), add the residual, normalise."""
        return self.norm.add(self.proj(attended.flatten(1)), x)[0]


class _CrossAttention(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.width // config.num_heads)
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.media_width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = LayerNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, media: ImageTokens) -> Tensor:
        each = x.shape[0] // max(media.start.numel(), 1)
        q = self.q(x).view(-1, *self.heads)
        k, v = self.kv(media.tokens).view(-1, 2, *self.heads).unbind(1)
        start, stop = (t.repeat_interleave(each, output_size=x.shape[0]) for t in (media.start, media.stop))
        y = cross_attention(q, k, v, start, stop, max_seqlen_q=each, max_seqlen_k=media.max_tokens)
        return self.norm.add(self.proj(y.flatten(1)), x)[0]


class _FeedForward(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.mlp = GeluMLP(config.width, config.mlp_width, config.activation)
        self.norm = LayerNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.add(self.mlp(x), x)[0]


class _Layer(nn.Module):
    def __init__(self, config: QFormerConfig, crosses: bool) -> None:
        super().__init__()
        self.attn = _SelfAttention(config)
        self.cross = _CrossAttention(config) if crosses else None
        self.ffn_query = _FeedForward(config)
        self.ffn_text = _FeedForward(config) if config.vocab_size else None

    def look(self, attended: Tensor, x: Tensor, media: ImageTokens) -> Tensor:
        """Finish the layer for queries (P * Q, D)."""
        x = self.attn.finish(attended, x)
        return self.ffn_query(x if self.cross is None else self.cross(x, media))

    def say(self, attended: Tensor, text: Tensor) -> Tensor:
        """Finish the layer for text (T, D)."""
        assert self.ffn_text is not None
        return self.ffn_text(self.attn.finish(attended, text))


class QFormer(nn.Module):
    """Turn the tokens of each image into Q queries that have read it, guided by text where there is any.

    There is no dropout: a published config's 0.1 acts in its own training only.

    Args:
        config: sizes; with `vocab_size`, text comes along.

    Equal to transformers' Blip2QFormerModel and InstructBlipQFormerModel in eval mode, and with their embeddings in
    front to LAVIS' BertLMHeadModel under its three masks.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.empty(config.num_queries, config.width))
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.layers = nn.ModuleList(_Layer(config, k % config.cross_every == 0) for k in range(config.depth))
        if config.vocab_size:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
            self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.reset_parameters()

    def with_text(self, vocab_size: int, max_positions: int) -> QFormer:
        """Return a Q-Former that reads text as well, made of these very modules and fresh ones for the text.

        Raises:
            ValueError: this one reads text already.
        """
        if self.config.vocab_size:
            raise ValueError(f"QFormer: it reads text already, of {self.config.vocab_size} tokens")
        made = QFormer(replace(self.config, vocab_size=vocab_size, max_positions=max_positions))
        made.queries, made.norm = self.queries, self.norm
        for mine, layer in zip(self._layers(), made._layers(), strict=True):
            layer.attn, layer.cross, layer.ffn_query = mine.attn, mine.cross, mine.ffn_query
        return made

    def reset_parameters(self) -> None:
        """Draw queries, linear layers and embeddings at 0.02 (BERT's initialisation), zero the biases."""
        nn.init.normal_(self.queries, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def encode_images(self, media: ImageTokens, keep: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Let queries see each other and their image: the unimodal mask.

        Args:
            media: what each set of queries sees.
            keep: return every layer's keys and values of the queries, which `encode_text` takes.

        Returns:
            (P * Q, D), and with `keep` one (P * Q, 2, H, Dh) a layer.

        Raises:
            ValueError: the media are not packed tokens of the right width.
        """
        x = self._start(media)
        bounds = self._query_bounds(media.start.numel(), x.device)
        kept: list[Tensor] = []
        for layer in self._layers():
            q, kv = layer.attn.project(x)
            if keep:
                kept.append(kv)
            k, v = kv.unbind(1)
            x = layer.look(attention(q, k, v, bounds, max_seqlen_q=self.config.num_queries), x, media)
        return x, kept

    def encode_text(self, text: PackedText, queries: Sequence[Tensor] = ()) -> Tensor:
        """Let text see itself, both ways: the unimodal mask. With queries, the causal multimodal (UniLM) mask.

        Args:
            text: P segments.
            queries: of `encode_images(..., keep=True)`: each row then sees all queries of its pair, and text up to
                itself.

        Returns:
            (T, D); padding rows hold no meaning.

        Raises:
            ValueError: the model has no text part, or a text is too long.
        """
        x = self._embed(text)
        if queries and len(queries) != len(self.layers):
            raise ValueError(f"QFormer: {len(queries)} layers of queries for a depth of {len(self.layers)}")
        bounds, longest, order = self._joint(text) if queries else (text.cu_seqlens, text.max_seqlen, x)
        for at, layer in enumerate(self._layers()):
            q, kv = layer.attn.project(x)
            if queries:
                kv = torch.cat([queries[at], kv]).index_select(0, order)
            k, v = kv.unbind(1)
            y = attention(q, k, v, text.cu_seqlens, bounds, text.max_seqlen, longest, causal=bool(queries))
            x = layer.say(y, x)
        return x

    def forward(self, media: ImageTokens, text: PackedText | None = None) -> Tensor:
        """Let queries and text of a pair see each other, and queries their image: the bidirectional mask.

        Args:
            media: what each set of queries sees.
            text: a segment a pair (InstructBLIP's instruction, ITM's caption), or None.

        Returns:
            (P * Q, D), the queries; the text of the last layer has no reader.

        Raises:
            ValueError: as `encode_images` and `encode_text`, or media and text differ in pairs.
        """
        if text is None:
            return self.encode_images(media)[0]
        pairs, each = media.start.numel(), self.config.num_queries
        if text.cu_seqlens.numel() != pairs + 1:
            raise ValueError(f"QFormer: {pairs} media ranges for {text.cu_seqlens.numel() - 1} texts")
        x, words = self._start(media), self._embed(text)
        bounds, (joint, longest, order) = self._query_bounds(pairs, x.device), self._joint(text)
        for at, layer in enumerate(self._layers(), 1):
            q, kv = layer.attn.project(x)
            word_q, word_kv = layer.attn.project(words)
            k, v = torch.cat([kv, word_kv]).index_select(0, order).unbind(1)
            y = attention(q, k, v, bounds, joint, each, longest)
            x = layer.look(y, x, media)
            if at < self.config.depth:
                y = attention(word_q, k, v, text.cu_seqlens, joint, text.max_seqlen, longest)
                words = layer.say(y, words)
        return x

    def _layers(self) -> list[_Layer]:
        return cast("list[_Layer]", list(self.layers))

    def _start(self, media: ImageTokens) -> Tensor:
        if media.tokens.dim() != 2 or media.tokens.shape[1] != self.config.media_width:
            raise ValueError(
                f"QFormer: media tokens must be packed (N, {self.config.media_width}), got {tuple(media.tokens.shape)}"
            )
        return self.norm(self.queries).expand(media.start.numel(), -1, -1).flatten(0, 1)

    def _embed(self, text: PackedText) -> Tensor:
        if not self.config.vocab_size:
            raise ValueError("QFormer: the model reads no text: vocab_size is 0")
        if text.max_seqlen > self.config.max_positions:
            raise ValueError(f"QFormer: a text of {text.max_seqlen} tokens, max_positions {self.config.max_positions}")
        rows = torch.arange(text.ids.numel(), device=text.ids.device)
        segment = torch.searchsorted(text.cu_seqlens[1:].long(), rows, right=True)
        places = (rows - text.cu_seqlens[segment]).clamp(max=self.config.max_positions - 1)  # padding too
        return self.norm(self.word_embeddings(text.ids) + self.position_embeddings(places))

    def _query_bounds(self, pairs: int, device: torch.device) -> Tensor:
        return torch.arange(pairs + 1, dtype=torch.int32, device=device) * self.config.num_queries

    def _joint(self, text: PackedText) -> tuple[Tensor, int, Tensor]:
        """Return how [all queries; all text] become [queries; text] a pair: boundaries, the longest, source rows."""
        each, pairs = self.config.num_queries, text.cu_seqlens.numel() - 1
        bounds = text.cu_seqlens + self._query_bounds(pairs, text.ids.device)
        rows = torch.arange(pairs * each + text.ids.numel(), device=text.ids.device)
        pair = torch.searchsorted(bounds[1:].long(), rows, right=True)
        inside = rows - bounds[pair]
        source = torch.where(
            inside < each, pair * each + inside, pairs * each + text.cu_seqlens[pair] + inside - each
        ).clamp(max=rows.numel() - 1)  # rows behind the last pair are nobody's keys
        return bounds, text.max_seqlen + each, source
