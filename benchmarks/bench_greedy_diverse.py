"""greedy_diverse against the loops of the published code, on their dense matrix of cosines."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.kernels.greedy_diverse import METHODS, greedy_diverse, greedy_diverse_triton

CUDA = torch.cuda.is_available()
# name, tokens of each segment, width, kept of each: a CLIP-L grid, projected tokens of LLaVA-1.5, tiles of LLaVA-NeXT
CASES = [("CLIP-L/336", [576], 1024, 64), ("LLaVA-1.5", [576], 4096, 64)]
CASES += [("CLIP-L/336 x16", [576] * 16, 1024, 64), ("LLaVA-NeXT", [2880], 4096, 320)] if CUDA else []
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield every method on CLIP-L grids with cosines held, and on a segment so long that rows are computed."""
    for method in METHODS:
        yield f"{method} S16 N576 D1024", lambda m=method: _launch(m, 16, 576, 1024, torch.bfloat16)
        yield f"{method} S1 N16384 D1280", lambda m=method: _launch(m, 1, 16384, 1280, torch.bfloat16)
    yield "max_min S1 N2880 D4096 fp32", lambda: _launch("max_min", 1, 2880, 4096, torch.float32)


def _launch(method: str, segments: int, n: int, width: int, dtype: torch.dtype) -> None:
    tokens = torch.empty((segments * n, width), dtype=dtype, device="meta")
    cu_seqlens = torch.empty(segments + 1, dtype=torch.int32, device="meta")
    relevance = None if method == "max_min" else torch.empty(segments * n, device="meta")
    greedy_diverse_triton(tokens, cu_seqlens, relevance, None, 64, 64 * segments, n, method, True)


def _max_min(x: Tensor, relevance: Tensor, k: int) -> Tensor:
    unit = F.normalize(x.float(), dim=-1)
    distance = 1 - unit @ unit.T
    picked = torch.empty(k, dtype=torch.long, device=x.device)
    for i in range(k):
        if i == 0:
            score = distance.topk(2, dim=0, largest=False).values[1]
        else:
            score = distance.index_select(0, picked[:i]).min(0).values
        picked[i] = score.argmax()
    return picked


def _dpp(x: Tensor, relevance: Tensor, k: int) -> Tensor:
    unit = F.normalize(x.float(), dim=-1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance[None]
    rows = x.new_zeros(k, x.shape[0], dtype=torch.float32)
    d = kernel.diagonal().clone()
    picked = torch.empty(k, dtype=torch.long, device=x.device)
    for i in range(k):
        j = d.argmax().view(1)  # a tensor index, all along, is what torch.compile takes
        picked[i] = j[0]
        row = kernel.index_select(0, j)[0] - rows[:i].index_select(1, j)[:, 0] @ rows[:i]
        rows[i] = row / d.index_select(0, j).sqrt()
        d -= rows[i].square()
        d.index_fill_(0, j, -torch.inf)
    return picked


def _coverage(x: Tensor, relevance: Tensor, k: int) -> Tensor:
    unit = F.normalize(x.float(), dim=-1)
    cosine = unit @ unit.T
    cover = torch.zeros_like(cosine[0])
    taken = torch.zeros_like(cover, dtype=torch.bool)
    picked = torch.empty(k, dtype=torch.long, device=x.device)
    for i in range(k):
        gain = (cosine.masked_fill(taken[None], 0) - cover[:, None]).clamp(min=0).sum(0) * relevance
        j = gain.masked_fill(taken, -torch.inf).argmax().view(1)
        picked[i] = j[0]
        taken.index_fill_(0, j, True)
        cover = torch.maximum(cover, cosine.index_select(0, j)[0])
    return picked


def _residual(x: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Keep the residuals themselves and take the direction of the picked one out of all of them."""
    rest = x.float().clone()
    taken = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    picked = torch.empty(k, dtype=torch.long, device=x.device)
    for i in range(k):
        j = (rest.square().sum(-1) * relevance).masked_fill(taken, -torch.inf).argmax().view(1)
        picked[i] = j[0]
        taken.index_fill_(0, j, True)
        direction = F.normalize(rest.index_select(0, j)[0], dim=0)
        rest -= (rest @ direction)[:, None] * direction
    return picked


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def bench_greedy_diverse(compare, case, dtype, method):
    name, lengths, width, k = case
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    n, segments = sum(lengths), len(lengths)
    centres = torch.randn(64 * segments, width, device=device)  # tokens in clusters, as in a picture
    x = (centres[torch.randint(64 * segments, (n,), device=device)] + 0.5 * torch.randn(n, width, device=device)).to(
        dtype
    )
    relevance = 0.5 + torch.rand(n, device=device)
    firsts = [sum(lengths[:i]) for i in range(segments + 1)]
    cu_seqlens = torch.tensor(firsts, dtype=torch.int32, device=device)
    published = {"max_min": _max_min, "dpp": _dpp, "coverage": _coverage, "residual": _residual}[method]
    compiled = torch.compile(published, fullgraph=True)

    def loop(one: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        parts = zip(x.split(lengths), relevance.split(lengths), firsts[:-1], strict=True)
        return torch.cat([one(xs, r, k).sort().values + first for xs, r, first in parts])

    def ours() -> Tensor:
        weight = None if method == "max_min" else relevance
        return greedy_diverse(x, cu_seqlens, k, method, weight, max_seqlen=max(lengths))[0]

    providers: dict[str, Callable[[], Tensor]] = {"fastmllm": ours, "torch loop": lambda: loop(published)}
    if n == 576 and width == 1024 and dtype == DTYPES[0]:  # unrolled, k steps long: compiling takes minutes
        providers["torch.compile"] = lambda: loop(compiled)
    pairs = sum(length * length for length in lengths) * width
    compare(
        op="greedy_diverse",
        case=f"{method} {name} N{lengths[0]} K{k} D{width} S{segments} {str(dtype)[6:]}",
        mode="forward",
        providers=providers,
        bytes=x.numel() * x.element_size(),
        flops=2 * (pairs if method in ("max_min", "coverage") else n * k * width),
    )
