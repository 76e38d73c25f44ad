"""attention_scores against eager attention with its weights, at the shapes of the towers and models that are pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fastmllm.kernels.attention import attention
from fastmllm.kernels.attention_scores import attention_scores, attention_scores_triton

CUDA = torch.cuda.is_available()
# name: (segments, rows of each, H, Hkv, D, causal, whose attention counts, method)
SHAPES = {
    "CLIP ViT-L/14 336 CLS (VisionZip)": (8, 577, 16, 16, 64, False, "first"),
    "SigLIP so400m 384 columns (VisionZip)": (8, 729, 16, 16, 72, False, "all"),
    "Qwen2.5-VL tower columns": (1, 4096, 16, 16, 80, False, "all"),
    "LLaVA-1.5-7B last row (FastV)": (8, 704, 32, 32, 128, True, "last"),
    "Qwen2.5-7B columns": (1, 4096, 28, 4, 128, True, "all"),
}
CPU_SHAPES = {
    "CLIP ViT-L/14 336 CLS (VisionZip)": (1, 577, 16, 16, 64, False, "first"),
    "CLIP ViT-L/14 336 columns": (1, 577, 16, 16, 64, False, "all"),
    "SmolLM2-135M last row (FastV)": (4, 256, 9, 3, 64, True, "last"),
    "SmolLM2-135M columns": (4, 256, 9, 3, 64, True, "all"),
}
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each shape, the other padded widths, all options at once, and other dtypes."""
    extra = {"D256": (1, 2048, 8, 1, 256, True, "all"), "D32 all options": (8, 256, 32, 32, 32, True, "options")}
    for name, shape in {**SHAPES, **extra}.items():
        yield name, lambda shape=shape: _launch(*shape)
    for d in (64, 80, 128):
        yield f"fp32 D{d}", lambda d=d: _launch(4, 512, 16, 8, d, True, "all", torch.float32)
    yield "fp16 D64", lambda: _launch(*SHAPES["CLIP ViT-L/14 336 CLS (VisionZip)"], torch.float16)


def _launch(
    segments: int, length: int, heads: int, heads_k: int, d: int, causal: bool, rows: str,
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    total, cu, fp32 = segments * length, empty(segments + 1, dtype=torch.int32), torch.float32
    chosen = None if rows == "all" else cu[:-1]
    weight, bias = (empty(total, dtype=fp32) if rows == "options" else None for _ in range(2))
    attention_scores_triton(
        empty(total, heads, d), empty(total, heads_k, d), empty(heads, total, dtype=fp32), cu, cu, length, causal,
        d**-0.5, "mean", chosen, chosen, weight, bias,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES if CUDA else CPU_SHAPES)
def bench_attention_scores(compare, name, dtype):
    segments, length, heads, heads_k, d, causal, rows = (SHAPES if CUDA else CPU_SHAPES)[name]
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    total = segments * length
    cu = torch.arange(0, total + 1, length, dtype=torch.int32, device=device)
    q, k = (torch.randn(total, n, d, device=device, dtype=dtype) for n in (heads, heads_k))
    _, lse = attention(q, k, k, cu, None, length, causal=causal, return_lse=True)

    def ours(q, k, lse):
        return attention_scores(q, k, lse, cu, max_seqlen_k=length, causal=causal, rows=rows)

    def eager(q, k, _lse):
        """All weights of the layer, as `output_attentions` gives them, then the rows and the mean of heads."""
        q, k = (t.view(segments, length, -1, d).transpose(1, 2) for t in (q, k))
        scores = q @ k.repeat_interleave(heads // heads_k, 1).mT * d**-0.5
        if causal:
            scores = scores + torch.full((length, length), -torch.inf, dtype=q.dtype, device=device).triu_(1)
        p = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        p = {"first": p[:, :, :1], "last": p[:, :, -1:], "all": p}[rows]
        return p.float().mean((1, 2)).view(-1)

    def asked(q, k, _lse):
        """Only the rows that are asked for: what a careful port of the method does."""
        q, k = (t.view(segments, length, -1, d).transpose(1, 2) for t in (q, k))
        q = q[:, :, :1] if rows == "first" else q[:, :, -1:]
        p = (q @ k.repeat_interleave(heads // heads_k, 1).mT * d**-0.5).softmax(-1, dtype=torch.float32)
        return p.mean((1, 2)).view(-1)

    def forward(q, k, _lse):
        """The attention that the scores belong to; it is no baseline, the ratio is what scores add."""
        return attention(q, k, k, cu, None, length, causal=causal).float().sum() * 0 + ours(q, k, _lse)

    providers = {"fastmllm": ours, "eager": eager, "torch.compile": torch.compile(eager)}
    if rows != "all":
        providers["eager, asked rows"] = asked
    providers["fastmllm with its attention"] = forward
    chosen = total if rows == "all" else segments
    compare(
        op="attention_scores",
        case=f"{name} {segments}x{length} H{heads}/{heads_k} D{d} {str(dtype)[6:]}",
        mode="forward",
        providers=providers,
        inputs=[q, k, lse],
        oracle=eager,
        bytes=(chosen * heads + total * heads_k) * d * q.element_size() + 4 * (heads * chosen + total),
        flops=2 * heads * d * chosen * length // (2 if causal and rows == "all" else 1),
    )
