"""cross_attention against SDPA and packed flash attention, at the shapes of Flamingo, Mllama, CogAgent and Q-Former."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from fastmllm.kernels.cross_attention import cross_attention, cross_attention_bwd_triton, cross_attention_triton

CUDA = torch.cuda.is_available()
# name: (images, rows of each, media tokens of each, H, Hkv, D)
SHAPES = {
    "OpenFlamingo": (64, 64, 64, 8, 8, 64),
    "Llama-3.2-Vision": (4, 512, 1601, 32, 8, 128),
    "CogAgent": (2, 256, 6400, 32, 32, 32),
    "Idefics": (32, 128, 64, 16, 16, 96),
    "Llama-3.2-Vision, decoding": (1, 1, 6404, 32, 8, 128),
    "Q-Former": (16, 32, 257, 12, 12, 64),
    "Perceiver": (1, 64, 10000, 8, 8, 64),
    "Perceiver of Idefics2": (4, 64, 4900, 16, 4, 96),
}
CPU_SHAPES = {
    "OpenFlamingo": (16, 24, 64, 8, 8, 64),
    "Llama-3.2-Vision, small": (4, 64, 400, 8, 2, 128),
    "Q-Former": (4, 32, 257, 12, 12, 64),
    "Llama-3.2-Vision, decoding": (1, 1, 1601, 32, 8, 128),
}
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each model's shape; few queries have low tiles and split keys."""
    for name, shape in SHAPES.items():
        yield name, lambda shape=shape: _launch(*shape)
    for d in (64, 128):
        yield f"fp32 D{d}", lambda d=d: _launch(4, 32, 257, 12, 12, d, torch.float32)
    yield "no gradient of queries", lambda: _launch(4, 512, 1601, 32, 8, 128, query_grad=False)


def _launch(
    images: int, rows: int, media: int, heads: int, heads_k: int, d: int, dtype: torch.dtype = torch.bfloat16,
    query_grad: bool = True,
) -> None:  # fmt: skip
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, bounds = empty(images * rows, heads, d), empty(images * media, heads_k, d), empty(images * rows).int()
    lse = empty(heads, images * rows, dtype=torch.float32)
    if query_grad:
        cross_attention_triton(q, k, k, bounds, bounds, rows, media, d**-0.5)
    cross_attention_bwd_triton(q, q, k, k, q, lse, bounds, bounds, rows, media, d**-0.5, query_grad, True)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES if CUDA else CPU_SHAPES)
def bench_cross_attention(compare, name, dtype, mode):
    images, text, media, heads, heads_k, d = (SHAPES if CUDA else CPU_SHAPES)[name]
    if mode != "forward" and text == 1:
        pytest.skip("decoding has no backward")
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    rows, keys = images * text, images * media
    leaves = [
        torch.randn(length, n, d, device=device, dtype=dtype).requires_grad_()
        for length, n in ((rows, heads), (keys, heads_k), (keys, heads_k))
    ]
    start = (torch.arange(rows, device=device) // text * media).int()  # each row sees its own (or its latest) image
    stop = start + media
    cols = torch.arange(keys, device=device)
    mask = (cols >= start[:, None]) & (cols < stop[:, None])
    cu_q, cu_k = (torch.arange(images + 1, device=device, dtype=torch.int32) * n for n in (text, media))

    def ours(q, k, v):
        return cross_attention(q, k, v, start, stop, max_seqlen_q=text, max_seqlen_k=media)

    def masked(q, k, v):
        dense = [t.transpose(0, 1)[None] for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*dense, attn_mask=mask, enable_gqa=heads != heads_k)
        return y[0].transpose(0, 1)

    def batched(q, k, v):
        """The best case of plain torch: one image a sample, all of one size, nothing to mask."""
        dense = [t.view(images, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*dense, enable_gqa=heads != heads_k)
        return y.transpose(1, 2).reshape(q.shape)

    def varlen(q, k, v):
        """FlashAttention-2 over packed segments, as torch ships it."""
        from torch.nn.attention.varlen import varlen_attn

        k, v = (t.repeat_interleave(heads // heads_k, 1) for t in (k, v)) if heads != heads_k else (k, v)
        return varlen_attn(q, k, v, cu_q, cu_k, text, media)

    size = leaves[0].element_size()
    compare(
        op="cross_attention",
        case=f"{name} {images}x{text}x{media} H{heads}/{heads_k} D{d} {str(dtype)[6:]}",
        mode=mode,
        providers={"fastmllm": ours, "SDPA, mask": masked, "SDPA, batched": batched}
        | ({"torch varlen": varlen} if CUDA else {}),
        inputs=leaves,
        bytes=2 * d * size * (rows * heads + keys * heads_k) * {"forward": 1, "backward": 2, "full": 3}[mode],
        flops=int(4 * rows * media * heads * d * {"forward": 1, "backward": 2.5, "full": 3.5}[mode]),
    )
