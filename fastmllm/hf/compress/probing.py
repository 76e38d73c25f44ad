"""The attention that visual tokens are judged by: of one layer, from the rows of a call, to a cache's keys as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmllm.compression import Probe
from fastmllm.compression.reduction import Reduction
from fastmllm.compression.tokens import cumulative
from fastmllm.hf.compress.cached import Left
from fastmllm.hf.compress.rows import PAD
from fastmllm.kernels.attention import attention


@dataclass(frozen=True, slots=True)
class Behind:
    """What a call stands behind.

    Args:
        whole: columns that the layer has seen, the call's too.
        columns: of the text that were in the cache.
        mask: (B, columns and the call's) on the host, 0 where the text is padded, or None.
        keys: (B, Hkv, N, D) of all of them.
    """

    whole: Left
    columns: int
    mask: Tensor | None
    keys: Tensor

    def packed(self, device: torch.device) -> tuple[Tensor, Tensor, list[int], Tensor]:
        """Return the keys (N', Hkv, D), where the call's rows stand among them, tokens of each row, and their slots."""
        index = self.whole.index.cpu()  # a wait, where a new image follows a cache
        there = index != PAD
        if self.mask is not None:
            there &= self.mask.gather(1, index.clamp(min=0)) != 0
        slots = there.flatten().nonzero()[:, 0].to(device)
        rank = (there.flatten().cumsum(0) - 1).view(index.shape)
        columns = rank[(index >= self.columns) & there].to(device)
        keys = self.keys.to(device).transpose(1, 2).flatten(0, 1).index_select(0, slots)
        return keys, columns, there.sum(1).tolist(), slots


def probe_of(
    q: Tensor, k: Tensor, slots: Tensor, reduction: Reduction, scale: float, behind: Behind | None
) -> Probe:  # fmt: skip
    """Return what scores are made of.

    Args:
        q: (B, T, H, D) as the layer's attention took them.
        k: (B, T, Hkv, D).
        slots: (T',) of their rows that are tokens.
        reduction: of those.
        scale: of the attention.
        behind: the cache in front of them, or None.
    """
    q = q.flatten(0, 1).index_select(0, slots)
    columns = cu_k = None
    longest, bias = reduction.max_seqlen, reduction.key_bias
    if behind is None:
        k = k.flatten(0, 1).index_select(0, slots)
    else:
        k, columns, counts, at = behind.packed(q.device)
        cu_k, longest = cumulative(counts, q.device), max(counts)
        bias = None if behind.whole.bias is None else behind.whole.bias.flatten().index_select(0, at)
    k = k.to(q.dtype)
    with torch.no_grad():
        _, lse = attention(
            q, k, k, reduction.cu_seqlens, cu_k, reduction.max_seqlen, longest, True, scale, bias, return_lse=True
        )
    return Probe(
        q=q, k=k, lse=lse, cu_seqlens=reduction.cu_seqlens, max_seqlen=longest, columns=columns, causal=True,
        softmax_scale=scale, key_bias=bias, cu_seqlens_k=cu_k,
    )  # fmt: skip
