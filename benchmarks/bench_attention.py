"""attention against SDPA, torch's varlen attention and flash_attn, at the shapes of towers and language models."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from fastmllm.kernels._flash_attn import clear_rows_triton
from fastmllm.kernels.attention import attention, attention_bwd_triton, attention_triton

CUDA = torch.cuda.is_available()
# name: (segments, rows of each, H, Hkv, D, causal)
SHAPES = {
    "CLIP ViT-L/14 336": (8, 577, 16, 16, 64, False),
    "SigLIP so400m 384": (8, 729, 16, 16, 72, False),
    "Qwen2.5-VL tower": (4, 1024, 16, 16, 80, False),
    "Qwen2.5-7B": (2, 4096, 28, 4, 128, True),
    "SmolLM2-135M": (16, 1024, 9, 3, 64, True),
    "Gemma-2B": (2, 2048, 8, 1, 256, True),
}
CPU_SHAPES = {
    "SmolLM2-135M short": (16, 24, 9, 3, 64, True),
    "DINOv2-S 224": (4, 257, 6, 6, 64, False),
    "SmolLM2-135M": (1, 512, 9, 3, 64, True),
}
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each shape, heads of 32 (CogAgent) and 96 (Phi-3-Vision), a bias of keys (ToMe), and the other dtypes."""
    for name, shape in {**SHAPES, "D32": (8, 256, 32, 32, 32, False), "D96": (2, 2048, 32, 32, 96, True)}.items():
        yield name, lambda shape=shape: _launch(*shape)
    for name in ("CLIP ViT-L/14 336", "SigLIP so400m 384", "Gemma-2B"):
        yield f"{name} bias", lambda shape=SHAPES[name]: _launch(*shape, biased=True)
    for d in (64, 80, 128):
        yield f"fp32 D{d}", lambda d=d: _launch(4, 512, 16, 8, d, True, dtype=torch.float32)
    yield "fp16 D64", lambda: _launch(*SHAPES["SmolLM2-135M"], dtype=torch.float16)
    yield "no gradient of queries", lambda: _launch(*SHAPES["Qwen2.5-7B"], query_grad=False)
    yield "rows behind", lambda: clear_rows_triton(_empty(4096, 16, 80), _empty(5, dtype=torch.int32))


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launch(
    segments: int, length: int, heads: int, heads_k: int, d: int, causal: bool, biased: bool = False,
    dtype: torch.dtype = torch.bfloat16, query_grad: bool = True,
) -> None:  # fmt: skip
    total, cu, fp32 = segments * length, _empty(segments + 1, dtype=torch.int32), torch.float32
    q, k = (_empty(total, n, d, dtype=dtype) for n in (heads, heads_k))
    lse = _empty(heads, total, dtype=fp32)
    options = (cu, cu, length, length, causal, d**-0.5, _empty(total, dtype=fp32) if biased else None)
    if query_grad:
        attention_triton(q, k, k, *options)
    attention_bwd_triton(q, q, k, k, q, lse, *options, query_grad, query_grad)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("lengths", ["equal", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES if CUDA else CPU_SHAPES)
def bench_attention(compare, name, dtype, lengths, mode):
    segments, length, heads, heads_k, d, causal = (SHAPES if CUDA else CPU_SHAPES)[name]
    if lengths == "ragged" and segments == 1:
        pytest.skip("one segment is never ragged")
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    sizes = [length - (i * length // (2 * segments) if lengths == "ragged" else 0) for i in range(segments)]
    total, longest = sum(sizes), max(sizes)
    cu = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32, device=device)
    leaves = [torch.randn(total, n, d, device=device, dtype=dtype).requires_grad_() for n in (heads, heads_k, heads_k)]
    slots = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(sizes)]).to(device)

    def ours(q, k, v):
        return attention(q, k, v, cu, max_seqlen_q=longest, causal=causal)

    def sdpa(q, k, v):
        """Pad to the longest segment: what the packed form replaces. Causal rows need no mask, others do."""
        padded = [
            t.new_zeros(segments * longest, *t.shape[1:]).index_copy(0, slots, t) if total < segments * longest else t
            for t in (q, k, v)
        ]
        dense = [t.view(segments, longest, -1, d).transpose(1, 2) for t in padded]
        mask = None if causal or total == segments * longest else mask_of_keys
        y = F.scaled_dot_product_attention(*dense, attn_mask=mask, is_causal=causal, enable_gqa=heads != heads_k)
        y = y.transpose(1, 2).reshape(segments * longest, heads, d)
        return y[slots] if total < segments * longest else y

    mask_of_keys = torch.arange(longest, device=device) < torch.tensor(sizes, device=device)[:, None]
    mask_of_keys = mask_of_keys[:, None, None]
    providers = {"fastmllm": ours, "SDPA": sdpa}
    if CUDA:
        providers.update(_gpu_providers(cu, longest, causal, heads != heads_k))
    dense_flops = 4 * heads * d * sum(n * n for n in sizes) // (2 if causal else 1)
    rows = total * d * leaves[0].element_size()
    compare(
        op="attention",
        case=f"{name} {segments}x{length} H{heads}/{heads_k} D{d} {str(dtype)[6:]} {lengths}",
        mode=mode,
        providers=providers,
        inputs=leaves,
        bytes=rows * {"forward": 2, "backward": 4, "full": 6}[mode] * (heads + heads_k),
        flops=int(dense_flops * {"forward": 1, "backward": 2.5, "full": 3.5}[mode]),
    )


def _gpu_providers(cu, longest, causal, gqa):
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def triton(q, k, v):
        out, _ = torch.ops.fastmllm.attention(q, k, v, cu, cu, longest, longest, causal, q.shape[2] ** -0.5)
        return out

    def torch_varlen(q, k, v):
        window = (-1, 0) if causal else (-1, -1)
        return varlen(q, k, v, cu, cu, longest, longest, window_size=window, enable_gqa=gqa)

    return {"Triton": triton, "torch varlen": torch_varlen}
