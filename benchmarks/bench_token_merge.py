"""token_merge against ToMe in plain torch with the N x N similarity, as the published code does it; also packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.kernels.token_merge import token_merge, token_merge_bwd_triton, token_merge_triton

CUDA = torch.cuda.is_available()
# I, N, D, M, r: a ViT-L block, a tile of it at 672 px, a connector grid
CASES = [(1, 577, 1024, 64, 16), (1, 2305, 1024, 64, 512), (8, 49, 1280, 1280, 24)]
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a ViT-L block with head-mean keys, and a connector that matches on its full width."""
    for n, width, metric in ((577, 1024, 64), (2304, 1152, 72), (256, 1280, 1280)):
        yield f"N{n} D{width} M{metric}", lambda n=n, d=width, m=metric: _launch(n, d, m)


def _launch(n: int, width: int, metric: int) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    r = n // 4
    cu_seqlens = empty(9, dtype=torch.int32)
    size, new_size = (empty(8 * k, dtype=torch.float32) for k in (n, n - r))
    removed = [r * i for i in range(9)]
    token_merge_triton(empty(8 * n, width), empty(8 * n, metric), size, cu_seqlens, removed, n, 1)
    token_merge_bwd_triton(empty(8 * (n - r), width), size, new_size, empty(8 * n, dtype=torch.int64))


def _published(x: Tensor, metric: Tensor, r: int) -> Tensor:
    """Do what ToMe's own code does, then put the tokens back in their order."""
    images, n, width = x.shape
    unit = F.normalize(metric.float(), dim=-1)  # products rounded to bf16 would find other pairs
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (I, N/2, N/2)
    best, node = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, kept = order[:, :r], order[:, r:].sort(dim=-1).values
    target = node.gather(1, merged)
    odd = x[:, 1::2]
    source = x[:, ::2].gather(1, merged.unsqueeze(-1).expand(-1, -1, width))
    sums = odd.scatter_add(1, target.unsqueeze(-1).expand_as(source), source)
    count = torch.ones_like(odd[..., 0]).scatter_add(1, target, torch.ones_like(target, dtype=x.dtype))
    out = torch.cat([x[:, ::2].gather(1, kept.unsqueeze(-1).expand(-1, -1, width)), sums / count.unsqueeze(-1)], 1)
    odd_places = torch.arange(1, n, 2, device=x.device).expand(images, -1)
    place = torch.cat([2 * kept, odd_places], 1).argsort(dim=-1)
    return out.gather(1, place.unsqueeze(-1).expand(-1, -1, width))


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_token_merge(compare, case, dtype, mode):
    images, n, width, metric_width, r = case
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    x = torch.randn(images, n, width, device=device, dtype=dtype).requires_grad_()
    metric = torch.randint(-8, 8, (images, n, metric_width), device=device).to(dtype)
    tensor = x.numel() * x.element_size()
    forward = 2 * tensor + metric.numel() * metric.element_size()
    compare(
        op="token_merge",
        case=f"I{images} N{n} D{width} M{metric_width} r{r} {str(dtype)[6:]}",
        mode=mode,
        providers={
            "fastmllm": lambda x: token_merge(x, metric, None, r).tokens,
            "torch": lambda x: _published(x, metric, r),
            "torch.compile": torch.compile(lambda x: _published(x, metric, r)),
        },
        inputs=[x],
        bytes=forward if mode == "forward" else forward + 2 * tensor,
        flops=images * n * n * metric_width // 2,
    )


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_token_merge_varlen(compare, dtype, mode):
    """Packed images of native resolution, a quarter of each merged, against the published code on one after another."""
    lengths = [1024, 576, 1296, 784] * (4 if CUDA else 1)
    width, device = 1280, "cuda" if CUDA else "cpu"
    counts, ends = [n // 4 for n in lengths], [0]
    for n in lengths:
        ends.append(ends[-1] + n)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    torch.manual_seed(0)
    x = torch.randn(ends[-1], width, device=device, dtype=dtype).requires_grad_()
    metric = torch.randint(-8, 8, (ends[-1], 80), device=device).to(dtype)

    def published(x):
        parts = zip(x.split(lengths), metric.split(lengths), counts, strict=True)
        return torch.cat([_published(a[None], b[None], r)[0] for a, b, r in parts])

    forward = x.numel() * x.element_size() * 7 // 4 + metric.numel() * metric.element_size()
    compare(
        op="token_merge",
        case=f"packed {len(lengths)} images of {min(lengths)} to {max(lengths)} D{width} M80 {str(dtype)[6:]}",
        mode=mode,
        providers={
            "fastmllm": lambda x: token_merge(x, metric, None, counts, cu_seqlens=cu_seqlens, max_seqlen=1296).tokens,
            "torch": published,
            "torch.compile": torch.compile(published),
        },
        inputs=[x],
        bytes=forward if mode == "forward" else forward + x.numel() * x.element_size() * 7 // 4,
        flops=sum(n * n for n in lengths) * 80 // 2,
    )
