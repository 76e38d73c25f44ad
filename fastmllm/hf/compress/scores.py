"""What scores are made of: the attention of a layer that was listened to, over the tokens that are judged."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmllm.compression import Probe, Tokens
from fastmllm.compression.reduction import Reduction
from fastmllm.compression.tokens import cumulative
from fastmllm.hf.compress.cached import Left
from fastmllm.hf.compress.listening import Listener
from fastmllm.hf.compress.rows import PAD
from fastmllm.hf.fused.tower_attention import half_table
from fastmllm.hf.fused.tower_grids import window_order
from fastmllm.kernels.attention import attention
from fastmllm.kernels.vision_rope import vision_rope

if TYPE_CHECKING:
    from fastmllm.hf.compress.state import Compression


@torch.no_grad()
def tower_probe(state: Compression, tokens: Tokens) -> Probe | None:
    """Return the watched layer's queries and keys, and which of its rows each token is made of.

    A connector that makes one token of r x r patches (pixel shuffle, average pooling, Qwen's merger) leaves no row of
    attention for it: its score is the mean of what its patches receive, its key the mean of theirs, as in the ports of
    VisionZip to such models.

    Raises:
        ValueError: rows and tokens do not fit.
    """
    if state.tower is None:
        return None
    return (_of_packed if "cos" in state.tower.now.watched else _of_batch)(state, state.tower, tokens)


def _of_batch(state: Compression, heard: Listener, tokens: Tokens) -> Probe:
    """Of a tower whose images are (I, S, C) with a class token in front or none, all of one size."""
    dim = heard.attention.head_dim
    if "packed" in heard.now.watched:  # BLIP-2's
        q, k, _ = heard.take("packed")[0].unflatten(-1, (3, -1, dim)).unbind(2)
    else:
        q, k = (x.unflatten(-1, (-1, dim)) for x in heard.take("queries", "keys"))
    (images, rows), each = q.shape[:2], tokens.seqlens[0]
    side = math.isqrt(rows // each)  # patches of a token, along one edge
    lead = rows - each * side**2
    if images != len(tokens.seqlens) or lead not in (0, 1) or (side > 1 and math.isqrt(each) ** 2 != each):
        raise ValueError(
            f"compress: {heard.judge} judges by the attention of {rows} rows of {images} images, but there "
            f"are {tokens.seqlens[:4]} tokens of {len(tokens.seqlens)}"
        )
    first = lead + rows * torch.arange(images, device=q.device)
    columns = first[:, None] + _blocks(each, side, q.device).flatten()
    columns = columns.flatten() if side == 1 else columns.view(-1, side**2)
    return _of_rows(
        q.flatten(0, 1), k.flatten(0, 1), (rows,) * images, columns if lead or side > 1 else None, state.cls_token
    )


def _blocks(tokens: int, side: int, device: torch.device) -> Tensor:
    """Return (N, side^2) int64 the patches of a square grid that each of its N tokens is made of."""
    if side == 1:
        return torch.arange(tokens, device=device)[:, None]
    edge = math.isqrt(tokens)
    patches = torch.arange(tokens * side**2, device=device).view(edge, side, edge, side)
    return patches.transpose(1, 2).reshape(tokens, side**2)


def _of_packed(state: Compression, heard: Listener, tokens: Tokens) -> Probe:
    """Of Qwen's towers: rows of all frames behind each other, the patches of a token side by side."""
    assert tokens.grid is not None
    assert state.seam.tower is not None
    tower, heads = getattr(state.owner, state.seam.tower), heard.attention.num_heads
    packed, cos, sin = heard.take("packed", "cos", "sin")
    q, k, _ = vision_rope(packed.unflatten(-1, (3 * heads, -1)), half_table(cos), half_table(sin), heads)
    side = tower.spatial_merge_size
    columns = torch.arange(len(packed), device=packed.device).view(-1, side**2)
    order = window_order(tower, [(t, h * side, w * side) for t, h, w in tokens.grid])
    if order is not None:
        columns = columns.index_select(0, order.argsort().to(columns.device))
    return _of_rows(q, k, tuple(h * w * side**2 for t, h, w in tokens.grid for _ in range(t)), columns, False)


def _of_rows(q: Tensor, k: Tensor, seqlens: tuple[int, ...], columns: Tensor | None, cls_token: bool) -> Probe:
    starts, longest = cumulative(seqlens, q.device), max(seqlens)
    _, lse = attention(q, k, k, starts, max_seqlen_q=longest, causal=False, return_lse=True)
    return Probe(q=q, k=k, lse=lse, cu_seqlens=starts, max_seqlen=longest, columns=columns, cls_token=cls_token)


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


@torch.no_grad()
def text_probe(heard: Listener, slots: Tensor, reduction: Reduction, behind: Behind | None) -> Probe:
    """Return the attention of a layer of a language model, over the rows of its group.

    Args:
        heard: the layer, whose queries and keys are turned as it turns them.
        slots: (T',) of the rows of (B, T) that are tokens.
        reduction: of those.
        behind: the cache in front of them, or None.
    """
    layer = heard.attention
    *projected, cos, sin = heard.take("queries", "keys", "cos", "sin")
    q, k = (x.unflatten(-1, (-1, layer.head_dim)) for x in projected)  # (B, T, H, D), (B, T, Hkv, D)
    if getattr(layer, "q_norm", None) is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    turn = inspect.unwrap(type(layer).forward).__globals__["apply_rotary_pos_emb"]
    q, k = (x.transpose(1, 2) for x in turn(q.transpose(1, 2), k.transpose(1, 2), cos, sin))
    q = q.flatten(0, 1).index_select(0, slots)
    columns = cu_k = None
    longest, bias, scale = reduction.max_seqlen, reduction.key_bias, layer.scaling
    if behind is None:
        k = k.flatten(0, 1).index_select(0, slots)
    else:
        k, columns, counts, at = behind.packed(q.device)
        cu_k, longest = cumulative(counts, q.device), max(counts)
        bias = None if behind.whole.bias is None else behind.whole.bias.flatten().index_select(0, at)
    k = k.to(q.dtype)
    _, lse = attention(
        q, k, k, reduction.cu_seqlens, cu_k, reduction.max_seqlen, longest, True, scale, bias, return_lse=True
    )
    return Probe(
        q=q, k=k, lse=lse, cu_seqlens=reduction.cu_seqlens, max_seqlen=longest, columns=columns, causal=True,
        softmax_scale=scale, key_bias=bias, cu_seqlens_k=cu_k,
    )  # fmt: skip
