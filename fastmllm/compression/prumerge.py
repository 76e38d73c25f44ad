"""Kept tokens take in their neighbours, as LLaVA-PruMerge has it (arXiv 2403.15388): for `DominantContextual`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmllm.compression.compressor import Probe
from fastmllm.compression.ragged import Padding, interleaved, pooled, repeat, units
from fastmllm.compression.selection import best, by_score, take
from fastmllm.compression.tokens import Plan, Tokens
from fastmllm.kernels._triton import accumulator_dtype

NEIGHBOURS = 32
Counts = tuple[int, ...]


def with_neighbours(tokens: Tokens, probe: Probe, scores: Tensor, keep: Tensor, budgets: Counts) -> tuple[Tokens, Plan]:
    """Turn each kept token into the mean of itself and its neighbours, weighted by scores.

    Args:
        tokens: of all images.
        probe: whose keys say what is near, of all heads.
        scores: (T,) at least 0.
        keep: (K,) int64 the tokens that stay, in order.
        budgets: how many they are in each segment; where they are all, they stay as they are.
    """
    index, weight = _neighbours(tokens, probe, scores, keep, budgets, _whole(tokens, budgets))
    own = scores.index_select(0, keep).clamp(min=1e-30)
    weight = torch.cat((own[:, None], weight), 1)
    # not weight.sum(1), whose order of adding depends on the longest image
    whole = _sums(torch.ones_like(scores)[:, None], keep, index, weight)
    merged = _sums(tokens.x, keep, index, weight / whole)
    return take(tokens, keep, budgets, merged)


def prumerge(tokens: Tokens, probe: Probe, budgets: Counts) -> tuple[Tokens, Plan]:
    """Reduce as the published code does: sums without a norm, best token first, the rest as one token at the end.

    Args:
        tokens: of all images.
        probe: q and k before they are split into heads, with a class token in front of each image.
        budgets: K of each segment, with that last token; where it is all of them, they stay as they are.
    """
    device, whole = tokens.x.device, _whole(tokens, budgets)
    rest_too = tuple(int(not w) for w in whole)
    kept = tuple(k - r for k, r in zip(budgets, rest_too, strict=True))
    scores = one_head(probe)
    keep = best(tokens, scores, kept)
    owners = repeat(range(len(kept)), kept, device)
    ranks = scores.index_select(0, keep).masked_fill(repeat(whole, kept, device), 0.0)
    keep = keep.index_select(0, by_score(ranks, owners))
    others = tuple((n - k) * r for n, k, r in zip(tokens.seqlens, kept, rest_too, strict=True))
    rest = best(tokens, torch.ones_like(scores).index_fill(0, keep, 0.0), others)
    starts = torch.tensor([0, *(n for n in others if n)]).cumsum(0).to(device, non_blocking=True)
    last = pooled(tokens.x, rest, starts, scores.index_select(0, rest))
    parts = [last]
    if len(keep):
        index, weight = _neighbours(tokens, probe, scores, keep, kept, whole)
        parts.insert(0, _sums(tokens.x, keep, index, torch.cat((torch.ones_like(weight[:, :1]), weight), 1)))
    order = interleaved(kept, rest_too, device)
    standing = rest.index_select(0, starts[1:] - 1)
    keep = torch.cat((keep, standing)).index_select(0, order)
    return take(tokens, keep, budgets, torch.cat(parts).index_select(0, order))


def one_head(probe: Probe) -> Tensor:
    """Return the attention (T,) of each segment's first row, computed as if all heads were one.

    Raises:
        ValueError: there are fewer heads of keys than of queries, so that they are not one.
    """
    if probe.q.shape[1] != probe.k.shape[1]:
        raise ValueError(
            "dominant_contextual: faithful neighbours need as many heads of keys as of queries, got "
            f"{probe.k.shape[1]} and {probe.q.shape[1]}"
        )
    keys = probe.k.flatten(1).to(accumulator_dtype(probe.k.dtype))
    starts = probe.cu_seqlens.long()
    query = probe.q.index_select(0, starts[:-1]).flatten(1).to(keys.dtype)
    every = torch.arange(len(keys), device=keys.device)
    owner = torch.searchsorted(starts[1:], every, right=True)
    logits = (keys * query.index_select(0, owner)).sum(1) * keys.shape[1] ** -0.5
    most = logits.new_full((len(starts) - 1,), -torch.inf).scatter_reduce(0, owner, logits, "amax")
    exps = (logits - most.index_select(0, owner)).exp()
    sums = pooled(exps[:, None], every, starts, torch.ones_like(exps))[:, 0]
    scores = exps / sums.index_select(0, owner)
    return probe.of_tokens(scores)


def _neighbours(
    tokens: Tokens, probe: Probe, scores: Tensor, keep: Tensor, kept: Counts, whole: list[bool]
) -> tuple[Tensor, Tensor]:
    """Return the tokens (K, M) whose keys are nearest to each kept one's, and their scores; 0 for what is none."""
    device = keep.device
    keys = units(probe.of_tokens(probe.k).flatten(1))
    every, chosen = Padding(tokens.seqlens, device), Padding(kept, device)
    ids, anchors = every.pad(torch.arange(len(keys), device=device)), chosen.pad(keep)
    cosine = every.mask(chosen.pad(keys.index_select(0, keep)) @ every.pad(keys).transpose(1, 2), -torch.inf)
    cosine = cosine.masked_fill(anchors[:, :, None] == ids[:, None], -torch.inf)  # (S, K, N), not with itself
    value, place = cosine.topk(min(NEIGHBOURS, every.width - 1), dim=2)
    index = chosen.unpad(ids[:, None].expand(-1, chosen.width, -1).gather(2, place))
    weight = scores.index_select(0, index.flatten()).view_as(index).masked_fill(chosen.unpad(value).isinf(), 0.0)
    if any(whole):
        weight = weight.masked_fill(repeat(whole, kept, device)[:, None], 0.0)
    return index, weight


def _sums(x: Tensor, keep: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted sums of each kept token, whose weights come first, and of its neighbours."""
    index = torch.cat((keep[:, None], index), 1)
    starts = torch.arange(len(keep) + 1, device=keep.device) * index.shape[1]
    return pooled(x, index.flatten(), starts, weight.flatten())


def _whole(tokens: Tokens, budgets: Counts) -> list[bool]:
    return [k == n for k, n in zip(budgets, tokens.seqlens, strict=True)]
