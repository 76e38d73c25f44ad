"""What a stack computes, moves and holds for pictures and text: counted on its own modules, without numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmllm.bench.roofline import Rates
from fastmllm.compression import Placement
from fastmllm.data.resolution import Plan
from fastmllm.models.kv_cache import KVCache
from fastmllm.models.mllm import MLLM
from fastmllm.plan.encode import META, encode_pictures
from fastmllm.plan.encoded import encoded
from fastmllm.plan.meter import Meter, Phase, owners_of
from fastmllm.plan.tokens import TokenCounts, rows_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What is asked at once.

    Args:
        samples: prompts.
        images: of a prompt, all of one size.
        text_tokens: of a prompt.
        new_tokens: of an answer.
    """

    samples: int = 1
    images: int = 1
    text_tokens: int = 64
    new_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("samples", "images", "text_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a batch costs.

    Args:
        prompt: rows of a sample that the language model is given.
        encode: towers, connectors and what compresses between them.
        prefill: of the prompt, and the head of its last rows.
        decode: one token of each sample, when half of the answer is there.
        weights: bytes.
        kv: bytes of keys and values at the end of the answers.
        cross_kv: bytes of keys and values of what layers look at.
    """

    prompt: int
    encode: Phase
    prefill: Phase
    decode: Phase
    weights: int
    kv: int
    cross_kv: int

    @property
    def total(self) -> int:
        """The most bytes at once."""
        caches = self.kv + self.cross_kv
        return self.weights + max(self.encode.peak, self.prefill.peak, caches + self.decode.peak)


def measure(
    model: MLLM, plan: Plan, counts: TokenCounts, placement: Placement, batch: Batch, rates: Rates, *, behind: bool
) -> Costs:  # fmt: skip
    """Run a batch on the meta device and count.

    Args:
        model: of a stack.
        plan: of each picture.
        counts: its tokens.
        placement: what compresses where.
        batch: the load.
        rates: of the device.
        behind: a compressor at the connector takes what comes out of it, not what goes in.

    Raises:
        ValueError: a compressor judges by what the tower does not have.
    """
    owners = owners_of(model, model.roles())
    encode = encode_pictures(
        model, plan, counts, placement, batch.samples * batch.images, Meter(rates, owners), behind=behind
    )
    meter = Meter(rates, owners)
    across = model.looks_across and not counts.llm_left
    rows = (counts.cross_left,) if across else rows_of(plan, counts)
    model.placement = Placement(stages=placement.stages)
    with encoded(
        model, plan, rows, 0 if across else counts.cross_left, samples=batch.samples, images=batch.images,
        text=batch.text_tokens,
    ) as inputs:  # fmt: skip
        prompt = inputs.num_tokens // batch.samples
        with meter.watching("llm"), meter.compressing(placement.compressors):
            cache = model.language.new_cache(batch.samples, prompt + batch.new_tokens)
            hidden, going_on = model.start(inputs, cache if placement.stages else None)
            model.language.logits(hidden[: batch.samples])
    prefill = meter.phase()
    if not placement.stages:  # it was run without its cache, which asks the device for boundaries
        cache.advance(cache.reserve([prompt] * batch.samples))
    _grow(cache, batch.new_tokens // 2, batch.samples)
    meter = Meter(rates, owners)
    with meter.watching("llm"):
        new = torch.zeros(batch.samples, dtype=torch.int64, device=META)
        model.language.logits(going_on.extend(new, [1] * batch.samples, cache))
    seen = () if going_on.media is None else [t for pair in going_on.media.kv.values() for t in pair]
    return Costs(
        prompt=prompt, encode=encode, prefill=prefill,
        decode=meter.phase(),
        weights=_bytes(model.parameters()), kv=_bytes([*cache.keys, *cache.values]), cross_kv=_bytes(seen),
    )  # fmt: skip


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _grow(cache: KVCache, tokens: int, samples: int) -> None:
    """Let every group of layers hold further tokens."""
    for group in range(len(cache.groups)) if tokens else ():
        cache.advance(cache.reserve([tokens] * samples, group=group))
