"""token_select against topk + sort + index_select: batched for segments of one length, else a loop; and its reference.

The first knows the lengths on the host, and gives neither padding, nor cu_seqlens, nor an order of equal scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastmllm.kernels.token_select import (
    token_select,
    token_select_bwd_triton,
    token_select_reference,
    token_select_triton,
)

CUDA = torch.cuda.is_available()
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)
# name, tokens of each segment, width, kept of each segment
CASES = [
    ("CLIP-L/336 192 of 576", [576], 1024, 192),
    ("LLaVA-1.5 64 of 576", [576], 4096, 64),
    ("SigLIP-so400m 128 of 729", [729] * 4, 1152, 128),
    ("LLaVA-NeXT 320 of 2880", [2880], 4096, 320),
    ("Qwen2.5-VL ragged", [1296, 361, 720, 196], 3584, 128),
    *([("CLIP-L/336 64 of 576", [576] * 64, 1024, 64), ("16 k 4 k of 16 k", [16384], 3584, 4096)] if CUDA else []),
]


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a batch with one budget, ragged budgets on the device, and a long segment; with ids, positions, sizes."""
    for name, n, width, ragged in (("S64 N576 D1024", 576, 1024, False), ("S4 N2880 D4096", 2880, 4096, True)):
        yield name, lambda n=n, d=width, r=ragged: _launch(n, d, r)


def _launch(n: int, width: int, ragged: bool) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    segments, total = 4, 256
    xs = [empty(4 * n, width), empty(4 * n, 3, dtype=torch.int64), empty(4 * n, dtype=torch.float32)]
    budget = empty(segments, dtype=torch.int32) if ragged else None
    *ys, index, place, _ = token_select_triton(
        xs, empty(segments + 1, dtype=torch.int32), empty(4 * n, dtype=torch.float32), budget, 64, total, n
    )
    token_select_bwd_triton([ys[0], ys[2]], index, place)


def _torch(x: Tensor, position: Tensor, scores: Tensor, lengths: list[int], k: int) -> tuple[Tensor, Tensor]:
    segments, n = len(lengths), lengths[0]
    if lengths == [n] * segments:
        local = scores.view(segments, n).topk(k, dim=1).indices.sort(dim=1).values
        index = (local + n * torch.arange(segments, device=x.device)[:, None]).flatten()
    else:
        firsts = [sum(lengths[:i]) for i in range(segments)]
        parts = zip(scores.split(lengths), firsts, strict=True)
        index = torch.cat([s.topk(min(k, s.shape[0])).indices.sort().values + first for s, first in parts])
    return x.index_select(0, index), position.index_select(0, index)


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def bench_token_select(compare, case, dtype, mode):
    name, lengths, width, k = case
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    n, kept = sum(lengths), sum(min(k, length) for length in lengths)
    x = torch.randn(n, width, device=device, dtype=dtype).requires_grad_()
    position = torch.rand(n, 3, device=device)  # floats, so that the providers' gradients have something to start from
    scores = torch.randperm(n, device=device).float()  # no equal ones: torch's topk may take any of them
    cu_seqlens = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device=device)
    longest = max(lengths)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        rows, _, _, planes = token_select(x, cu_seqlens, scores, k, [position], total=kept, max_seqlen=longest)
        return (rows, planes[0]) if mode == "forward" else (rows,)

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        rows, plane = _torch(x, position, scores, lengths, k)
        return (rows, plane) if mode == "forward" else (rows,)

    def same(x: Tensor) -> tuple[Tensor, Tensor]:
        rows, plane, *_ = token_select_reference([x, position], cu_seqlens, scores, None, k, kept, longest)
        return (rows, plane) if mode == "forward" else (rows,)

    row = width * x.element_size()
    moved = 4 * n + 2 * kept * (row + 12)
    compare(
        op="token_select",
        case=f"{name} D{width} S{len(lengths)} {str(dtype)[6:]}",
        mode=mode,
        providers={
            "fastmllm": ours,
            "torch": eager,
            "torch.compile": torch.compile(eager),
            "torch, same results": same,
            "torch.compile, same results": torch.compile(same),
        },
        inputs=[x],
        bytes=moved if mode == "forward" else moved + (kept + n) * row,
    )
