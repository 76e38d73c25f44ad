"""Tokens of images of different sizes, and an attention over them: what the tests of compressors start from."""

from __future__ import annotations

import torch

from fastmllm.compression.compressor import Evidence, Probe
from fastmllm.compression.tokens import Tokens
from fastmllm.kernels.attention import attention

GRIDS = ((1, 3, 5), (1, 4, 4), (2, 2, 3))  # 15, 16 and 12 tokens


def pictures(grids=GRIDS, dtype=torch.float32, seed=0, heads=2) -> tuple[Tokens, Evidence]:
    """Make tokens, and an attention with a class token in front of each image."""
    pieces, qs, ks, columns, at = [], [], [], [], 0
    for index, grid in enumerate(grids):
        generator = torch.Generator().manual_seed(seed + index)
        n = grid[0] * grid[1] * grid[2]
        pieces.append(torch.randn(n, 6, generator=generator, dtype=dtype))
        qs.append(torch.randn(n + 1, heads, 4, generator=generator, dtype=dtype))
        ks.append(torch.randn(n + 1, heads, 4, generator=generator, dtype=dtype))
        columns.append(torch.arange(at + 1, at + 1 + n))
        at += n + 1
    tokens = Tokens.of(torch.cat(pieces), grids)
    lengths = [0, *(n + 1 for n in tokens.seqlens)]
    cu_seqlens = torch.tensor(lengths).cumsum(0).int()
    q, k = torch.cat(qs), torch.cat(ks)
    _, lse = attention(q, k, k, cu_seqlens, max_seqlen_q=max(lengths), causal=False, return_lse=True)
    probe = Probe(q=q, k=k, lse=lse, cu_seqlens=cu_seqlens, max_seqlen=max(lengths), columns=torch.cat(columns),
                  cls_token=True, text=torch.zeros(len(q)).index_fill(0, cu_seqlens[:-1].long(), 1.0))  # fmt: skip
    relevance = torch.rand(len(tokens.x), generator=torch.Generator().manual_seed(seed))
    return tokens, Evidence(probe=probe, relevance=relevance, scores=relevance)
