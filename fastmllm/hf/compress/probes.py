"""What scores are made of, where a connector's tokens are one or several rows of the tower's attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmllm.compression import Probe, Tokens
from fastmllm.compression.tokens import cumulative
from fastmllm.hf.fused.tower_attention import half_table
from fastmllm.hf.fused.tower_grids import window_order
from fastmllm.kernels.attention import attention
from fastmllm.kernels.vision_rope import vision_rope

if TYPE_CHECKING:
    from fastmllm.hf.compress.state import Compression


@torch.no_grad()
def probe_of(state: Compression, tokens: Tokens) -> Probe | None:
    """Return the watched layer's queries and keys, and which of its rows each token is made of.

    A connector that makes one token of r x r patches (pixel shuffle, average pooling, Qwen's merger) leaves no row of
    attention for it: its score is the mean of what its patches receive, its key the mean of theirs, as in the ports of
    VisionZip to such models.

    Raises:
        ValueError: rows and tokens do not fit.
    """
    if state.compressor.layer is None:
        return None
    turned = "cos" in state.now.watched
    return _of_packed(state, tokens) if turned else _of_batch(state, tokens)


def _of_batch(state: Compression, tokens: Tokens) -> Probe:
    """Of a tower whose images are (I, S, C) with a class token in front or none, all of one size."""
    dim = state.attention.head_dim
    if "packed" in state.now.watched:  # BLIP-2's
        q, k, _ = state.now.watched.pop("packed").unflatten(-1, (3, -1, dim)).unbind(2)
    else:
        q, k = (state.now.watched.pop(name).unflatten(-1, (-1, dim)) for name in ("queries", "keys"))
    (images, rows), each = q.shape[:2], tokens.seqlens[0]
    side = math.isqrt(rows // each)  # patches of a token, along one edge
    lead = rows - each * side**2
    if images != len(tokens.seqlens) or lead not in (0, 1) or (side > 1 and math.isqrt(each) ** 2 != each):
        raise ValueError(
            f"compress: {state.compressor.name} judges by the attention of {rows} rows of {images} images, but there "
            f"are {tokens.seqlens[:4]} tokens of {len(tokens.seqlens)}"
        )
    first = lead + rows * torch.arange(images, device=q.device)
    columns = first[:, None] + _blocks(each, side, q.device).flatten()
    columns = columns.flatten() if side == 1 else columns.view(-1, side**2)
    return _probe(
        q.flatten(0, 1), k.flatten(0, 1), (rows,) * images, columns if lead or side > 1 else None, state.cls_token
    )


def _blocks(tokens: int, side: int, device: torch.device) -> Tensor:
    """Return (N, side^2) int64 the patches of a square grid that each of its N tokens is made of."""
    if side == 1:
        return torch.arange(tokens, device=device)[:, None]
    edge = math.isqrt(tokens)
    patches = torch.arange(tokens * side**2, device=device).view(edge, side, edge, side)
    return patches.transpose(1, 2).reshape(tokens, side**2)


def _of_packed(state: Compression, tokens: Tokens) -> Probe:
    """Of Qwen's towers: rows of all frames behind each other, the patches of a token side by side."""
    assert tokens.grid is not None
    assert state.seam.tower is not None
    tower, heads = getattr(state.owner, state.seam.tower), state.attention.num_heads
    packed, cos, sin = (state.now.watched.pop(name) for name in ("packed", "cos", "sin"))
    q, k, _ = vision_rope(packed.unflatten(-1, (3 * heads, -1)), half_table(cos), half_table(sin), heads)
    side = tower.spatial_merge_size
    columns = torch.arange(len(packed), device=packed.device).view(-1, side**2)
    order = window_order(tower, [(t, h * side, w * side) for t, h, w in tokens.grid])
    if order is not None:
        columns = columns.index_select(0, order.argsort().to(columns.device))
    return _probe(q, k, tuple(h * w * side**2 for t, h, w in tokens.grid for _ in range(t)), columns, False)


def _probe(q: Tensor, k: Tensor, seqlens: tuple[int, ...], columns: Tensor | None, cls_token: bool) -> Probe:
    starts, longest = cumulative(seqlens, q.device), max(seqlens)
    _, lse = attention(q, k, k, starts, max_seqlen_q=longest, causal=False, return_lse=True)
    return Probe(
        q=q, k=k, lse=lse, cu_seqlens=starts, max_seqlen=longest, columns=columns, cls_token=cls_token
    )  # fmt: skip
