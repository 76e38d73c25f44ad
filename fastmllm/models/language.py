"""Decoder-only language models of the Llama, Mistral, Qwen2 and Qwen3 families, on packed sequences.

Layers that look at images can be inserted before, inside and behind the decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastmllm.compression.reduction import Reduction
from fastmllm.compression.tokens import segments
from fastmllm.kernels.cross_attention import segment_ranges
from fastmllm.models.decoder import DecoderLayer, LanguageConfig, Pass
from fastmllm.models.kv_cache import KVCache
from fastmllm.models.media import Deepstack, Media
from fastmllm.models.recompute import is_recomputed, recompute
from fastmllm.models.rope import rope_frequencies, rope_tables
from fastmllm.modules.lm_head import LMHead

POSITION_OFFSET = 2  # rows of OPT's table in front of position 0


class _Decoder(nn.Module):
    """Embedding, layers and final norm: the part that Hugging Face names `model`."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size + config.extra_embeddings, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.depth))
        self.norm = config.norm()
        self.embed_positions = None
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_positions + POSITION_OFFSET, config.width)


class LanguageModel(nn.Module):
    """Decode packed sequences; parameter names and values of Hugging Face's LlamaForCausalLM and its relatives.

    Equal to transformers' Llama, Mistral, Qwen2 and Qwen3, to the text models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL,
    without its cross layers to that of Llama-3.2-Vision, and to OPT with its norms in front. Dropout is not applied.

    Args:
        config: the shape.

    Attributes:
        cross_layers: modules that look at media, by the decoder layer that they stand before; "depth" as a number is
            behind the last one. What they must have: `Media.show`.
        inner_layers: the same, inside of a decoder layer between attention and MLP (CogAgent).
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Decoder(config)
        self.lm_head = LMHead(config.width, config.vocab_size)
        self.cross_layers = nn.ModuleDict()
        self.inner_layers = nn.ModuleDict()
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
    def gradient_checkpointing(self) -> bool:
        """Whether each layer is recomputed in the backward pass instead of keeping its activations."""
        return all(is_recomputed(layer) for layer in self.model.layers)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        recompute((*self.model.layers, *self.cross_layers.values()), on)

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

        Raises:
            ValueError: sequences longer than a learned table of positions.
        """
        if self.config.learned_positions:
            self._check_length(max_length)
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
            input_ids: (T,) integers below V, or V + `extra_embeddings`.

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
        *,
        media: Media | None = None,
        deepstack: Deepstack | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """Decode packed sequences.

        Args:
            inputs_embeds: (T, D), all sequences one after another.
            position_ids: (T,) integers, or (3, T) time, row and column with M-RoPE; restart in each sequence, go on
                from the cached ones with a cache (`KVCache.next_positions`).
            cu_seqlens: (S+1,) int32 boundaries.
            max_seqlen: longest sequence of this call, host.
            cache: earlier tokens of the same S sequences; the new ones are added. Only without autograd.
            media: what the inserted layers look at; None skips them, and the result is the plain decoder's.
            deepstack: features added behind the first layers; only with the tokens that they belong to.
            reduction: drops or merges visual tokens between layers; only with the tokens that they are.

        Returns:
            (T, D) hidden states after the final norm, of the rows that `reduction` leaves.

        Raises:
            ValueError: shapes that do not fit together, a cache under autograd, media without a layer that looks at
                them, or a sequence longer than dynamic RoPE scaling is computed for.
        """
        self._check(inputs_embeds, position_ids, cu_seqlens, cache)
        self._check_slots(inputs_embeds, media, deepstack)
        if reduction is not None and reduction.stages and max(reduction.stages) >= self.config.depth:
            raise ValueError(
                f"fastmllm::LanguageModel: a reduction in front of layer {max(reduction.stages)}, the model has "
                f"{self.config.depth}"
            )
        passes: list[Pass] = []
        counts: Sequence[int] | None = None if reduction is None else reduction.visual.counts
        if cache is not None and counts is None:
            # one token a sequence needs no look at the device; otherwise the lengths are read back once a call
            counts = [1] * (len(cu_seqlens) - 1) if max_seqlen == 1 else cu_seqlens.diff().tolist()
        following = None if cache is None or counts is None else _following(position_ids, counts, cache, reduction)
        x = inputs_embeds
        for index, layer in enumerate(self.model.layers):
            reduced = reduction is not None and index in reduction.stages
            if reduction is not None and reduced:
                probe = passes[-1].seen.get(index - 1) if passes else None
                x, position_ids, rows = reduction.apply(index, x, position_ids, probe)
                cu_seqlens, max_seqlen, counts = reduction.cu_seqlens, reduction.max_seqlen, reduction.visual.counts
                media = None if media is None else media.at(rows)
                deepstack = None if deepstack is None else deepstack.at(reduction.visual.index, reduction.kept)
                if cache is not None and index:
                    cache.split(index, reduction.fewest_dropped)
            if index == 0 or reduced or (cache is not None and index in cache.groups):
                group = 0 if cache is None else cache.groups.index(index)
                passes.append(self._context(position_ids, cu_seqlens, max_seqlen, cache, group, reduction, counts))
            context = passes[-1]
            if index == 0 and self.model.embed_positions is not None:
                x = x + self.model.embed_positions(position_ids + POSITION_OFFSET)
            x = self._cross(index, x, media)
            inner = None
            if media is not None and str(index) in self.inner_layers:
                inner = partial(media.show, self.inner_layers[str(index)], ~index)
            x = layer(x, context, inner)
            if deepstack is not None:
                x = deepstack.add(x, index)
        x = self._cross(self.config.depth, x, media)
        if cache is not None:
            if reduction is not None and reduction.renumbered:
                following = None  # as many as are left
            for one in passes:
                if one.slots is not None:
                    cache.advance(one.slots, following)
        return self.model.norm(x)

    def _context(
        self, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, cache: KVCache | None, group: int,
        reduction: Reduction | None, counts: Sequence[int] | None,
    ) -> Pass:  # fmt: skip
        """Compute what all layers share, or those behind a reduction."""
        config, scaling = self.config, self.config.rope_scaling
        slots, window, longest = None, None, max_seqlen
        if cache is not None and counts is not None:
            slots = cache.reserve(counts, config.sliding_window, group)
            if reduction is not None and reduction.key_bias is not None:
                cache.add_bias(reduction.key_bias, slots)
            longest = slots.limit
        self._check_length(longest)
        if config.sliding_window is not None and max_seqlen > config.sliding_window:
            window = _window_ranges(cu_seqlens, position_ids.shape[-1], config.sliding_window)
        cos = sin = None
        if not config.learned_positions:
            frequencies = rope_frequencies(config.head_dim, config.rope_theta, scaling, position_ids.device)
            cos, sin = rope_tables(
                position_ids,
                frequencies,
                config.mrope_section,
                config.mrope_interleaved,
                1.0 if scaling is None else scaling.table_factor,
            )
        return Pass(
            cos=cos, sin=sin, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, window=window, cache=cache, slots=slots,
            key_bias=None if reduction is None else reduction.key_bias,
            probed=frozenset() if reduction is None else reduction.probed,
        )  # fmt: skip

    def _cross(self, index: int, x: Tensor, media: Media | None) -> Tensor:
        if media is None or str(index) not in self.cross_layers:
            return x
        return media.show(self.cross_layers[str(index)], index, x)

    def _check(self, inputs_embeds: Tensor, position_ids: Tensor, cu_seqlens: Tensor, cache: KVCache | None) -> None:
        if inputs_embeds.dim() != 2 or inputs_embeds.shape[1] != self.config.width:
            raise ValueError(
                f"fastmllm::LanguageModel: inputs_embeds must be packed (T, {self.config.width}), "
                f"got {tuple(inputs_embeds.shape)}"
            )
        rows = inputs_embeds.shape[:1]
        if position_ids.shape != rows and (self.config.mrope_section is None or position_ids.shape != (3, *rows)):
            raise ValueError(
                f"fastmllm::LanguageModel: position_ids {tuple(position_ids.shape)} must name each of the "
                f"{len(inputs_embeds)} packed tokens, (T,) or with M-RoPE (3, T)"
            )
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"fastmllm::LanguageModel: cu_seqlens must be (S+1,), got {tuple(cu_seqlens.shape)}")
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("fastmllm::LanguageModel: a cache is for inference; call under torch.no_grad()")

    def _check_length(self, longest: int) -> None:
        config, scaling = self.config, self.config.rope_scaling
        if longest <= config.max_positions:
            return
        if config.learned_positions:
            raise ValueError(
                f"fastmllm::LanguageModel: a sequence of {longest} tokens is longer than the {config.max_positions} "
                "learned positions: shorten it"
            )
        if scaling is not None and scaling.kind == "dynamic":
            raise ValueError(
                f"fastmllm::LanguageModel: a sequence of {longest} tokens is longer than max_positions "
                f"{config.max_positions}, where dynamic RoPE scaling depends on the other sequences: shorten it"
            )

    def _check_slots(self, inputs_embeds: Tensor, media: Media | None, deepstack: Deepstack | None) -> None:
        if deepstack is not None and len(deepstack.tokens) > self.config.depth:
            raise ValueError(
                f"fastmllm::LanguageModel: deepstack for {len(deepstack.tokens)} layers, the model has "
                f"{self.config.depth}"
            )
        if media is None:
            return
        depth = self.config.depth
        known = {str(index) for index in range(depth)}
        wrong = sorted((set(self.cross_layers) - known - {str(depth)}) | (set(self.inner_layers) - known))
        if wrong or not (self.cross_layers or self.inner_layers):
            raise ValueError(
                f"fastmllm::LanguageModel: media for a model of {depth} layers whose cross_layers are "
                f"{list(self.cross_layers)} and inner_layers {list(self.inner_layers)}: "
                + (f"there is no layer {wrong[0]}" if wrong else "nothing looks at them")
            )
        if len(media.start) != len(inputs_embeds):
            raise ValueError(
                f"fastmllm::LanguageModel: media for {len(media.start)} text rows, but there are {len(inputs_embeds)}: "
                "`Media.at` chooses them for a decoding step"
            )


def _window_ranges(cu_seqlens: Tensor, num_rows: int, window: int) -> tuple[Tensor, Tensor]:
    """Return the first row that each row sees, and the one behind the last, (T,) int32 each."""
    first, end = segment_ranges(cu_seqlens, cu_seqlens, num_rows)
    behind = torch.arange(1, num_rows + 1, dtype=torch.int32, device=cu_seqlens.device)
    return torch.maximum(first, behind - window), torch.minimum(end, behind)


def _following(
    position_ids: Tensor, counts: Sequence[int], cache: KVCache, reduction: Reduction | None
) -> list[int] | None:
    """Return where the text goes on, None: behind as many positions as there are new tokens in the cache.

    With M-RoPE an image takes fewer; one that loses tokens takes as many as before.
    """
    if position_ids.dim() == 1 and reduction is not None:
        return [place + n for place, n in zip(cache.next_positions, counts, strict=False)]  # `reserve` checks them
    if position_ids.dim() == 1 or max(counts) == 1:
        return None
    last = torch.zeros(len(counts), dtype=position_ids.dtype, device=position_ids.device)
    last.scatter_reduce_(0, segments(counts, position_ids.device), position_ids.amax(0), "amax")
    return [place + 1 for place in last.tolist()]
